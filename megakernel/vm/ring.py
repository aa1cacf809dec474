"""The ring of pages of one SM: which use of which instruction each slot holds, and whether it was released.

Use n of a launch takes slot n % depth.  The loader fills uses in order, the consumer takes and releases them in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megakernel.vm.cells import Actor, Cell
from megakernel.vm.errors import Fault
from megakernel.vm.record import Record
from megakernel.vm.sight import Clock


class Run(NamedTuple):
    """Consecutive page uses loaded at once: `number` (of the launch) onwards, uses `use` onwards of `record` for `token`.

    `content` is the first page on the tape, or one copied KV page, or None for a use that passes through empty.
    """

    record: Record
    token: int
    number: int
    use: int
    length: int
    content: int | torch.Tensor | None


class Ring:
    """`filled` and `released` count uses since the launch began; `slots` holds, for each page, the run it was loaded with."""

    def __init__(self, sm: int, depth: int, weights: torch.Tensor) -> None:
        self.depth, self.weights = depth, weights
        self.filled = Cell(f"pages loaded by sm {sm}")
        self.released = Cell(f"pages released by sm {sm}")
        self.slots: list[Run | None] = [None] * depth
        self.clocks: list[Clock | None] = [None] * depth  # of the consumer when it released what each slot held before
        self.empty = torch.full((weights.shape[1],), torch.nan, dtype=weights.dtype)

    def check_next(self, number: int, record: Record) -> None:
        """The loader may go on with use `number`, or the page plan is wrong: raises VmError naming what it would destroy."""
        if number == self.filled.value:
            return
        slot = number % self.depth
        run = self.slots[slot]
        problem = f"its page word makes this use {number} of the SM, but {self.filled.value} is next"
        if run is not None:
            held = max(n for n in range(run.number, run.number + run.length) if n % self.depth == slot)
            if held >= self.released.value:
                owner = f"use {run.use + held - run.number} of #{run.record.index} ({run.record.item.instruction.MNEMONIC})"
                problem += f": the page of {owner} in slot {slot} would be overwritten before it is read"
        raise record.error(problem)

    def put(self, run: Run) -> None:
        """Fill the slots of a run, which must be free; the caller raises `filled`."""
        slots, depth = self.slots, self.depth
        for number in range(run.number, run.number + run.length):
            slots[number % depth] = run

    def free(self, count: int, clock: Clock, ready: list[Actor]) -> None:
        """Release the next `count` uses."""
        for number in range(self.released.value, self.released.value + count):
            self.clocks[number % self.depth] = clock
        self.released.add(count, ready)

    def take(self, number: int, record: Record, token: int, use: int, count: int) -> torch.Tensor:
        """The `count` pages from use `number`, [count, page elements]; they must be the record's own."""
        run, skipped = self.owned(number, record, token, use)
        if record.selects:
            return self.weights[self.indices(number, record, token, use, count)]
        if isinstance(run.content, int):
            first, left = run.content + skipped, count - (run.length - skipped)
            if left > 0:  # what is left is the next run's, and runs of one record follow each other on the tape
                self.owned(number + count - left, record, token, use + count - left)
            return self.weights.narrow(0, first, count)
        runs = [self.owned(number + i, record, token, use + i)[0] for i in range(count)]
        return torch.stack([run.content if isinstance(run.content, torch.Tensor) else self.empty for run in runs])

    def indices(self, number: int, record: Record, token: int, use: int, count: int) -> list[int]:
        """Which pages of the tape `count` uses from use `number` hold."""
        found = []
        for i in range(count):
            run, skipped = self.owned(number + i, record, token, use + i)
            assert isinstance(run.content, int)
            found.append(run.content + skipped)
        return found

    def owned(self, number: int, record: Record, token: int, use: int) -> tuple[Run, int]:
        """The run that holds use `number`, which must be use `use` of the record for this token, and its place in the run."""
        run = self.slots[number % self.depth]
        if run is not None and run.record is record and run.token == token:
            skipped = number - run.number
            if 0 <= skipped < run.length and run.use + skipped == use:
                return run, skipped
        found = "nothing" if run is None else f"pages of #{run.record.index}, token {run.token}"
        raise Fault(f"page use {use} finds {found} in slot {number % self.depth}")
