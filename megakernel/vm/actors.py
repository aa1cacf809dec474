"""The two actors of an SM: the loader streams pages ahead, the consumer waits, executes and signals.

Both walk the SM's queue for many tokens, as their twins in the kernel do; a step ends wherever others could interfere.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from instructions.base import Instruction, PageRequest, Region
from instructions.shape import ANNOUNCED, HELD_PAGES, Shape
from megakernel.vm.cells import Actor, Cell, Need, Steps
from megakernel.vm.errors import Fault, VmError
from megakernel.vm.machine import ExecutingMachine
from megakernel.vm.memory import Activations
from megakernel.vm.record import Record
from megakernel.vm.ring import Ring, Run
from megakernel.vm.sight import Clock, Moment, Sight, before, check_begin, ended, merged
from megakernel.vm.state import DecodeState
from megakernel.vm.step import Step


class Grid(Protocol):
    """What the SMs of one launch share."""

    shape: Shape
    state: DecodeState
    tokens: int  # most tokens to decode
    start: int  # position of the first token
    epoch: int  # epoch of the first token
    counters: list[Cell]
    end: int  # number of the counter of the token's end,
    finished: Cell  # and that counter
    memory: Activations
    stored: Cell  # instructions that have ended
    sight: Sight
    ready: list[Actor]

    @property
    def over(self) -> bool:
        """Whether no sequence has a position left to decode."""

    def begin_token(self, token: int) -> None:
        """A consumer is about to begin this token: the first to come poisons the activations."""

    def step(self, token: int) -> Step:
        """Where this token's columns stand; raises Fault where that is not known yet."""


class Sm:
    """One SM: its queue, the page uses that one token makes, its ring, the waits that it passes, bool [records, waits], and
    the tokens its consumer has begun."""

    def __init__(self, number: int, records: list[Record], uses: int, ring: Ring, passed: np.ndarray) -> None:
        self.number, self.records, self.uses, self.ring, self.passed = number, records, uses, ring, passed
        self.begun = Cell(f"tokens begun by sm {number}")
        self.begun_clocks: list[Clock] = []  # what its consumer could see when it began each of them


class Loader(Actor):
    """Fills the ring in queue order, at most one token ahead of its SM's consumer."""

    loads = True

    def __init__(self, sm: Sm, grid: Grid) -> None:
        self.unit, self.grid, self.clock = sm, grid, grid.sight.nothing
        super().__init__(sm.number)

    def run(self) -> Steps:
        begun = self.unit.begun
        for token in range(self.grid.tokens):
            self.token, self.index = token, 0
            if begun.value < token:
                yield Need(begun, token)
            if token:
                self.clock = merged(self.clock, self.unit.begun_clocks[token - 1])
            for record in self.unit.records:
                self.index = record.index
                if record.item.pages:
                    yield from self.stream(record)

    def stream(self, record: Record) -> Steps:
        """All page uses of one instruction."""
        grid, item = self.grid, record.item
        if item.load_wait is not None:
            counter, want = grid.counters[item.load_wait.counter], item.load_wait.threshold(grid.epoch + self.token)
            if counter.value < want:
                yield Need(counter, want)
            self.clock = merged(self.clock, grid.sight.counters[item.load_wait.counter])
        try:
            if record.selects:
                yield from self.stream_chosen(record)
            else:
                yield from (self.stream_tape if record.streams_tape else self.stream_cache)(record)
        except Fault as fault:
            raise record.error(f"{fault} (loader, token {self.token})") from None

    def stream_tape(self, record: Record) -> Steps:
        """Consecutive pages of weights, as many at a time as the ring has room for."""
        ring, item, use = self.unit.ring, record.item, 0
        if not 0 <= item.tape <= len(ring.weights) - item.pages:
            raise Fault(f"loads pages {item.tape}+{item.pages} of a tape of {len(ring.weights)}")
        first = self.token * self.unit.uses + item.page
        while use < item.pages:
            ring.check_next(first + use, record)
            released, want = ring.released, first + use - ring.depth + 1
            if released.value < want:
                yield Need(released, want)
            stop = min(item.pages, released.value + ring.depth - first)
            ring.put(Run(record, self.token, first + use, use, stop - use, item.tape + use))
            ring.filled.add(stop - use, self.grid.ready)
            use = stop
            yield None

    def choice(self, record: Record) -> Generator[Need | None, None, list[int]]:
        """Look for the numbers of experts that the instruction selects by, until they are there."""
        grid, epoch, chosen = self.grid, self.grid.epoch + self.token, list[int]()
        for region in record.selects:
            while not grid.memory.written(region, epoch):
                self.check_vacant(region, epoch)
                yield Need(grid.stored, grid.stored.value + 1)
            self.check_vacant(region, epoch)
            chosen += [int(number) for number in grid.memory.read(region, epoch)]
        return chosen

    def check_vacant(self, region: Region, epoch: int) -> None:
        """What is looked at must have been made vacant by the token before, for this loader to see: or it takes an older choice
        for this token's."""
        memory, sight = self.grid.memory, self.grid.sight
        span = memory.span(region)
        for row, (last, (sm, number)) in enumerate(zip(memory.epochs[span], sight.activations.last(span), strict=True)):
            if last < epoch - 1 and epoch:
                raise Fault(f"looks at row {region.start + row} of {region}, which the token before has not made vacant yet")
            vacated = number if last == epoch - 1 else before(number, int(sight.lengths[sm]))
            if self.clock[sm] < vacated:
                raise Fault(f"looks at row {region.start + row} of {region}, without sight of its being made vacant by sm {sm}")

    def stream_chosen(self, record: Record) -> Steps:
        """Pages of the experts that were chosen, one by one; which, is looked for when the first of them may be filled."""
        ring, item, shape, chosen = self.unit.ring, record.item, self.grid.shape, list[int]()
        for use in range(item.pages):
            number = self.token * self.unit.uses + item.page + use
            ring.check_next(number, record)
            if ring.released.value < number - ring.depth + 1:
                yield Need(ring.released, number - ring.depth + 1)
            freed = ring.clocks[number % ring.depth]
            self.clock = self.clock if freed is None else merged(self.clock, freed)
            chosen = chosen or (yield from self.choice(record))
            source = item.instruction.page_source(shape, item.tape, use, 0, chosen)
            if source is None or not 0 <= source.index < len(ring.weights):
                raise Fault(f"loads page {source} of a tape of {len(ring.weights)}")
            ring.put(Run(record, self.token, number, use, 1, source.index))
            ring.filled.add(1, self.grid.ready)
            yield None

    def stream_cache(self, record: Record) -> Steps:
        """KV pages one by one, copied as they are at that moment; uses without a page pass through empty."""
        ring, item, grid = self.unit.ring, record.item, self.grid
        cached = past = grid.start + self.token
        shape = grid.shape
        for use in range(item.pages):
            number = self.token * self.unit.uses + item.page + use
            ring.check_next(number, record)
            if ring.released.value < number - ring.depth + 1:
                yield Need(ring.released, number - ring.depth + 1)
            freed = ring.clocks[number % ring.depth]
            self.clock = self.clock if freed is None else merged(self.clock, freed)
            if grid.shape.columns > 1 and not use:
                cached, past, slices = self.look(record)
                shape = replace(shape, slices=slices)
            source = item.instruction.page_source(shape, item.tape, use, past)
            page = None if source is None else self.load(source.index, cached, past)
            ring.put(Run(record, self.token, number, use, 1, page))
            ring.filled.add(1, grid.ready)
            yield None

    def look(self, record: Record) -> tuple[int, int, int]:
        """Where a sequence stands, which the step before has decided: the positions that are cached, those attended to, and
        into how many slices those are split."""
        self.grid.sight.token.check((slice(0, 1),), self.clock, "looks where its step begins")
        step, shape = self.grid.step(self.token), self.grid.shape
        sequence = step.columns[record.item.instruction.columns(shape)[0]].sequence
        columns = shape.columns_of(sequence)
        return step.columns[columns[0]].cached, step.columns[columns[-1]].position, step.slices(sequence)

    def load(self, index: int, cached: int, past: int) -> torch.Tensor:
        """A copy of a KV page; its newest row must be visible, and older ones are if their token was seen to end."""
        cache, sight, epoch = self.grid.state.cache, self.grid.sight, self.grid.epoch + self.token
        page = cache.load(index, past, cached)
        layer, head, first = cache.place(index)
        if cached - 1 < first + cache.page_positions or self.grid.shape.columns > 1:
            rows = slice(head * cache.head_rows, (head + 1) * cache.head_rows)
            sight.cache.check(((epoch - 1) % 2, layer, rows), self.clock, f"loads KV page {index} up to position {cached - 1}")
        return page


class Columns:
    """An instruction that runs for all of its columns at once, in their order."""

    def __init__(self, instruction: Instruction, machine: ExecutingMachine) -> None:
        self.machine = machine
        self.runs = [(column, instruction.execute(machine)) for column in instruction.columns(machine.shape)]

    def send(self, pages: torch.Tensor | None) -> PageRequest:
        """Hand on pages, at first None; returns what is asked for next.  Raises StopIteration at the end of all."""
        requests: list[PageRequest | None] = []
        for column, run in self.runs:
            self.machine.turn(column)
            try:
                requests.append(next(run) if pages is None else run.send(pages))
            except StopIteration:
                requests.append(None)
        if len(set(requests)) != 1:
            raise Fault(f"its columns ask for different pages: {requests}")
        if requests[0] is None:
            raise StopIteration
        return requests[0]


class Consumer(Actor):
    """Opens a token by the counter of the last one's end; then per instruction: waits, executes, signals."""

    def __init__(self, sm: Sm, grid: Grid, machine: ExecutingMachine) -> None:
        self.unit, self.grid, self.machine, self.clock = sm, grid, machine, grid.sight.nothing
        super().__init__(sm.number)

    def run(self) -> Steps:
        grid, counters, sight = self.grid, self.grid.counters, self.grid.sight
        for token in range(grid.tokens):
            self.token, self.index = token, 0
            if token:  # the first of a launch is open at once
                if grid.finished.value < grid.epoch + token:
                    yield Need(grid.finished, grid.epoch + token, opens=True)
                self.clock = merged(self.clock, sight.counters[grid.end])
            if grid.over:
                return
            self.check_begin()
            grid.begin_token(token)
            self.unit.begun_clocks.append(self.clock)
            self.unit.begun.add(1, grid.ready)
            for record in self.unit.records:
                self.index = record.index
                for wait, passed in zip(record.item.waits, self.unit.passed[record.index], strict=False):
                    if passed or wait.counter == grid.end:  # as in the kernel: that one has been waited for already
                        continue
                    want = wait.threshold(grid.epoch + token)
                    if counters[wait.counter].value < want:
                        yield Need(counters[wait.counter], want)
                    self.clock = merged(self.clock, sight.counters[wait.counter])
                moment = Moment(self.sm, token * len(self.unit.records) + record.index + 1)
                yield from self.execute(record, moment)
                self.clock = ended(self.clock, moment)
                grid.stored.add(1, grid.ready)
                for counter in record.item.signals:
                    if record.item.release:
                        sight.release(self.clock, counter)
                    counters[counter].add(1, grid.ready)
                yield None

    def check_begin(self) -> None:
        """All that the tokens before have stored must be visible, to an SM that has anything to do."""
        records = self.unit.records
        if records:
            try:
                check_begin(self.clock, self.grid.sight.lengths, self.token)
            except Fault as fault:
                raise records[0].error(str(fault)) from None

    def execute(self, record: Record, moment: Moment) -> Steps:
        """One instruction; whatever it raises is reported with its place and text."""
        self.machine.begin(record, self.grid.epoch + self.token, self.grid.step(self.token), self.clock, moment)
        try:
            if self.unit.passed[record.index].any():
                yield from self.look(record)
            yield from self.supply(record)
            self.machine.end()
        except VmError:
            raise
        except Fault as fault:
            raise record.error(f"{fault} (token {self.token})") from None
        except Exception as error:
            raise record.error(f"cannot be executed: {error!r} (token {self.token})") from error

    def look(self, record: Record) -> Steps:
        """Until all values that announce themselves and that the instruction reads are there."""
        memory, stored, epoch = self.grid.memory, self.grid.stored, self.grid.epoch + self.token
        for region in record.reads:
            columns = self.grid.shape.columns if self.grid.shape.buffers[region.buffer].column else 1
            while region.buffer in ANNOUNCED and not memory.written(region, epoch, columns):
                yield Need(stored, stored.value + 1)

    def without_others(self, record: Record, content: torch.Tensor, first: int, taken: int) -> torch.Tensor:
        """Pages as they come from the ring, NaN where they are of experts that this token's choice has not."""
        memory, epoch, shape = self.grid.memory, self.grid.epoch + self.token, self.grid.shape
        chosen = [int(number) for region in record.selects for number in memory.read(region, epoch)]
        held = self.unit.ring.indices(first + taken, record, self.token, taken, len(content))
        for place, index in enumerate(held):
            source = record.item.instruction.page_source(shape, record.item.tape, taken + place, 0, chosen)
            if source is None or source.index != index:
                content[place] = torch.nan
        return content

    def supply(self, record: Record) -> Steps:
        """Run the instruction, handing it pages in order as they land and releasing them when it asks for more.

        It runs once for each of its columns, which ask for the same pages and are handed the same."""
        ring, ready, uses, filled = self.unit.ring, self.grid.ready, record.item.pages, self.unit.ring.filled
        first, taken, held = self.token * self.unit.uses + record.item.page, 0, 0
        columns = Columns(record.item.instruction, self.machine)
        try:
            request = columns.send(None)
            while True:
                count = request.count
                if request.first != taken or not 1 <= count <= HELD_PAGES or taken + count > uses:
                    raise Fault(f"asks for page uses {request.first}+{count} after {taken} of {uses}")
                if filled.value < first + taken + count:
                    yield Need(filled, first + taken + count)
                content = ring.take(first + taken, record, self.token, taken, count)
                if record.selects:
                    content = self.without_others(record, content, first, taken)
                taken, held = taken + count, count
                request = columns.send(content)
                ring.free(held, self.clock, ready)
                yield None
        except StopIteration:
            ring.free(held, self.clock, ready)
        if taken != uses:
            raise Fault(f"took {taken} of its {uses} page uses")
