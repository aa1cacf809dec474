"""The ring of pages of one SM: which use of which instruction each slot holds, and whether it was released.

Use n of a launch takes slot n % depth.  The loader fills uses in order, the consumer takes and releases them in order.
"""

from __future__ import annotations

import torch

from megakernel.vm.cells import Cell
from megakernel.vm.errors import Fault
from megakernel.vm.record import Record

Content = int | torch.Tensor | None  # a page of the tape, a copy of a KV page, nothing


class Slot:
    """What was loaded last: page use `number` of the launch, use `use` of `record` for token `token`."""

    __slots__ = ("content", "number", "record", "token", "use")

    def __init__(self) -> None:
        self.number = -1
        self.token = self.use = 0
        self.record: Record | None = None
        self.content: Content = None


class Ring:
    """`filled` and `released` count uses since the launch began."""

    def __init__(self, sm: int, depth: int, weights: torch.Tensor) -> None:
        self.depth, self.weights = depth, weights
        self.filled = Cell(f"pages loaded by sm {sm}")
        self.released = Cell(f"pages released by sm {sm}")
        self.slots = [Slot() for _ in range(depth)]
        self.empty = torch.full((weights.shape[1],), torch.nan, dtype=weights.dtype)

    def check_next(self, number: int, record: Record) -> None:
        """The loader may go on with use `number`, or the page plan is wrong: raises VmError naming what it would destroy."""
        if number == self.filled.value:
            return
        slot = self.slots[number % self.depth]
        problem = f"its page word makes this use {number} of the SM, but {self.filled.value} is next"
        if slot.record is not None and slot.number >= self.released.value:
            owner = f"use {slot.use} of #{slot.record.index} ({slot.record.item.instruction.MNEMONIC})"
            problem += f": the page of {owner} in slot {number % self.depth} would be overwritten before it is read"
        raise record.error(problem)

    def put(self, number: int, record: Record, token: int, use: int, content: Content) -> None:
        """Fill the slot of use `number`, which must be free."""
        slot = self.slots[number % self.depth]
        slot.number, slot.record, slot.token, slot.use, slot.content = number, record, token, use, content

    def take(self, number: int, record: Record, token: int, use: int, count: int) -> torch.Tensor:
        """The `count` pages from use `number`, [count, page elements]; they must be the record's own."""
        contents: list[Content] = []
        for i in range(count):
            slot = self.slots[(number + i) % self.depth]
            if slot.number != number + i or slot.record is not record or slot.use != use + i or slot.token != token:
                owner = "nothing" if slot.record is None else f"use {slot.use} of #{slot.record.index}, token {slot.token}"
                raise Fault(f"page use {use + i} finds {owner} in slot {(number + i) % self.depth}")
            contents.append(slot.content)
        if record.streams_tape:
            first = contents[0]
            assert isinstance(first, int)
            return self.weights[first : first + count]
        return torch.stack([self.empty if page is None else page for page in contents if not isinstance(page, int)])
