"""The DAG, derived from the regions that instructions declare; nobody types an edge in.

For every instruction: which others must have finished before it starts, in the same token (lag 0) or in the one before
(lag 1).  Read after write, and write after read where a later write reuses the rows.  What already follows from another
wait is dropped.  A counter stands for one set of producers that some reader waits for as a whole, so edges run
instruction -> counter -> instruction, and the counter's target is the size of the set.

Sets of instructions are Python integers used as bit masks (bit i: instruction i in program order).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from instructions.base import Instruction, Region
from instructions.codec import MAX_SIGNALS, MAX_WAITS, Wait
from instructions.shape import Shape
from scheduler.errors import ScheduleError

Key = tuple[str, int]
TOKEN = Region("token", 0, 0, 1)


@dataclass(frozen=True)
class Dependencies:
    """Per instruction, in program order; `counters` holds each counter's producers as a bit mask."""

    waits: list[tuple[Wait, ...]]
    load_waits: list[Wait | None]
    signals: list[tuple[int, ...]]
    counters: list[int]
    before_previous: list[int]  # instructions of the token before that have finished when this one starts


def members(mask: int) -> list[int]:
    """The instructions in a bit mask, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


class Accesses:
    """Who writes and who reads which rows, by buffer and layer."""

    def __init__(self, program: Sequence[Instruction], shape: Shape) -> None:
        self.writers: dict[Key, list[tuple[int, int, int]]] = defaultdict(list)
        readers: dict[Key, dict[Region, int]] = defaultdict(lambda: defaultdict(int))
        for i, instruction in enumerate(program):
            for region in instruction.writes(shape):
                self.writers[region.buffer, region.layer].append((region.start, region.stop, i))
            for region in instruction.reads(shape):
                readers[region.buffer, region.layer][region] |= 1 << i
        self.readers = readers
        for (buffer, layer), writes in self.writers.items():
            writes.sort()
            for (_, stop, i), (start, _, j) in zip(writes, writes[1:], strict=False):
                if start < stop:
                    raise ScheduleError(f"{program[i]} and {program[j]} both write row {start} of {buffer}[{layer}]")
        self.producers_of: dict[Region, int] = {}

    def producers(self, region: Region) -> int:
        """Mask of the instructions that write the region's rows; every row must have one."""
        if region not in self.producers_of:
            writes = self.writers.get((region.buffer, region.layer), [])
            mask, row = 0, region.start
            for start, stop, i in writes[max(bisect_left(writes, (region.start, 0, 0)) - 1, 0) :]:
                if start >= region.stop:
                    break
                if stop > region.start:
                    if start > row:
                        break
                    mask, row = mask | 1 << i, stop
            if row < region.stop:
                raise ScheduleError(f"row {row} of {region} is read but nobody writes it")
            self.producers_of[region] = mask
        return self.producers_of[region]

    def readers_of(self, region: Region) -> int:
        """Mask of the instructions that read any row of the region."""
        mask = 0
        for other, readers in self.readers[region.buffer, region.layer].items():
            if other.start < region.stop and region.start < other.stop:
                mask |= readers
        return mask


class Deriver:
    """Chooses waits for each instruction, in program order, skipping what other waits already imply."""

    def __init__(self, program: Sequence[Instruction], shape: Shape) -> None:
        self.program, self.shape = program, shape
        self.accesses = Accesses(program, shape)
        count = len(program)
        self.chosen: list[list[tuple[int, int]]] = [[] for _ in range(count)]  # (producers, lag)
        self.before = [0] * count  # same token
        self.before_previous = [0] * count
        self.closures: dict[tuple[str, int], int] = {}
        self.sets = [self.followed(i) for i in range(count)]

    def closure(self, name: str, mask: int) -> int:
        """Union of `before` or `before_previous` over the instructions of a mask."""
        if (name, mask) not in self.closures:
            table: list[int] = getattr(self, name)
            union = 0
            for i in members(mask):
                union |= table[i]
            self.closures[name, mask] = union
        return self.closures[name, mask]

    def followed(self, i: int) -> list[int]:
        """Sets that instruction i must follow, in this token or the one before: producers of what it reads, and readers of what
        it overwrites."""
        instruction = self.program[i]
        regions = (*instruction.reads(self.shape), *instruction.selects(self.shape))
        reads = [self.accesses.producers(region) for region in regions]
        rewrites = [self.accesses.readers_of(region) & ~(1 << i) for region in instruction.writes(self.shape)]
        return [*reads, *rewrites]

    def needs(self, i: int, lag: int) -> list[int]:
        """Sets that instruction i must follow, in their part of the given lag.

        Sets with the latest members come first: a set can only follow from one with a later member, so whatever is chosen
        in this order follows from nothing chosen after it.
        """
        earlier = (1 << i) - 1
        parts = [mask & ~earlier if lag else mask & earlier for mask in self.sets[i]]
        return sorted(filter(None, parts), reverse=True)

    def same_token(self) -> None:
        """Choose the wait of lag 0, one counter for all that is needed, since every poll costs time; fill `before`."""
        for i in range(len(self.program)):
            together = 0
            for mask in self.needs(i, 0):
                if mask & ~self.before[i]:
                    together |= mask
                    self.before[i] |= mask | self.closure("before", mask)
            if together:
                self.chosen[i].append((together, 0))

    def previous_token(self) -> None:
        """Choose the waits of lag 1 and fill `before_previous`."""
        for i in range(len(self.program)):
            for mask, _ in self.chosen[i]:
                self.before_previous[i] |= self.closure("before_previous", mask)
            for mask in self.needs(i, 1):
                if mask & ~self.before_previous[i]:
                    self.chosen[i].append((mask, 1))
                    self.before_previous[i] |= mask | self.closure("before", mask)

    def loads(self, i: int) -> bool:
        """Whether the loader streams rows of earlier tokens for instruction i, or looks for a choice, which it must not take
        for that of an earlier token; every row must have a producer."""
        instruction = self.program[i]
        regions = (*instruction.loads(self.shape), *instruction.selects(self.shape))
        return bool([self.accesses.producers(region) for region in regions])


def derive(program: Sequence[Instruction], shape: Shape) -> Dependencies:
    """Waits, load waits, signals and counters of a program; raises ScheduleError where it makes no sense."""
    deriver = Deriver(program, shape)
    deriver.same_token()
    deriver.previous_token()
    numbers: dict[int, int] = {}

    def wait_for(mask: int, lag: int) -> Wait:
        return Wait(numbers.setdefault(mask, len(numbers)), mask.bit_count(), lag)

    end = deriver.accesses.producers(TOKEN)  # its signal releases all that the token has stored: the others need not
    waits = [tuple(wait_for(mask, lag) for mask, lag in chosen) for chosen in deriver.chosen]
    load_waits = [wait_for(end, 1) if deriver.loads(i) else None for i in range(len(program))]
    for i, own in enumerate(waits):
        if len(own) > MAX_WAITS:
            raise ScheduleError(f"{program[i]} needs {len(own)} waits; a record holds {MAX_WAITS}")
    counters = list(numbers)
    signals: list[list[int]] = [[] for _ in program]
    for counter, mask in enumerate(counters):
        for i in members(mask):
            signals[i].append(counter)
            if len(signals[i]) > MAX_SIGNALS:
                raise ScheduleError(f"{program[i]} feeds more than {MAX_SIGNALS} groups of readers; split its rows")
    return Dependencies(waits, load_waits, [tuple(s) for s in signals], counters, deriver.before_previous)
