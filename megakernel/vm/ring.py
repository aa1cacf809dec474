"""The ring of pages of one SM: which use of which instruction each slot holds, and whether it was released.

Use n of a launch takes slot n % depth.  The loader fills uses in order, the consumer takes and releases them in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megakernel.vm.cells import Cell
from megakernel.vm.errors import Fault
from megakernel.vm.record import Record


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

    def take(self, number: int, record: Record, token: int, use: int, count: int) -> torch.Tensor:
        """The `count` pages from use `number`, [count, page elements]; they must be the record's own."""
        content: int | torch.Tensor | None = None
        copies: list[torch.Tensor] = []
        taken = 0
        while taken < count:
            run = self.slots[(number + taken) % self.depth]
            skipped = -1 if run is None else number + taken - run.number
            if (
                run is None
                or run.record is not record
                or run.token != token
                or run.use + skipped != use + taken
                or not 0 <= skipped < run.length
            ):
                found = "nothing" if run is None else f"pages of #{run.record.index}, token {run.token}"
                raise Fault(f"page use {use + taken} finds {found} in slot {(number + taken) % self.depth}")
            if not taken:
                content = run.content if not isinstance(run.content, int) else run.content + skipped
            if not record.streams_tape:
                copies.append(run.content if isinstance(run.content, torch.Tensor) else self.empty)
            taken += run.length - skipped
        if isinstance(content, int):
            return self.weights[content : content + count]  # runs of one record follow each other on the tape
        return torch.stack(copies)
