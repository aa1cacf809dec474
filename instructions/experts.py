"""What the instructions share that multiply matrices of the chosen experts: which of them is known only at run time.

A token has `experts_per_token` slots; slot j's expert is the number in row j of choice[layer], which `Choose` writes.  An
instruction's pages belong to slots, so their number is fixed; its loader looks for the slots' numbers and then streams the
pages of those experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from instructions.base import Machine, PageSource, Region
from instructions.dimensions import Dimensions
from instructions.matvec import RowBlocks, Widening
from models.formats import Packed


@dataclass(frozen=True)
class ExpertRows(RowBlocks):
    """Row blocks of the matrices of kind `MATRIX` of some slots' experts."""

    LAYERED = True

    def slots(self, shape: Dimensions) -> range:
        """The slots whose experts it multiplies by."""
        raise NotImplementedError

    def place(self, shape: Dimensions, use: int) -> tuple[int, int]:
        """The slot that page use `use` belongs to, counted from its first, and the page's distance from `tape_page` if the
        expert were 0."""
        raise NotImplementedError

    def selects(self, shape: Dimensions) -> tuple[Region, ...]:
        slots = self.slots(shape)
        return (Region("choice", self.layer, slots.start, slots.stop),)

    def page_source(self, shape: Dimensions, tape: int, use: int, past: int, chosen: Sequence[int] = ()) -> PageSource | None:
        slot, page = self.place(shape, use)
        chosen = chosen or self.slots(shape)
        return PageSource("tape", tape + chosen[slot] * self.matrix(shape).pages + page)

    def streams(self, shape: Dimensions) -> tuple[tuple[int, int], ...]:
        matrix = self.matrix(shape)
        first, pages = self.tape_page(shape), self.blocks * matrix.pages_per_block
        starts = (first + slot * matrix.pages for slot in self.slots(shape))
        return tuple((start, start + pages) for start in starts)

    def experts(self, machine: Machine) -> list[int]:
        """The experts of its slots."""
        return [int(number) for region in self.selects(machine.shape) for number in machine.read(region)]

    def beside(self, machine: Machine, expert: int, block: int, blocks: int) -> torch.Tensor:
        """What lies beside the pages of some row blocks of an expert's matrix, fp32 [blocks, pages, words]."""
        matrix = machine.shape.matrix(self.MATRIX, self.layer, expert)
        words = matrix.pages_per_block * matrix.format.scale_words
        found = machine.constants(matrix.scale_offset + block * words, blocks * words)
        return found.view(blocks, matrix.pages_per_block, -1)

    def widened(self, machine: Machine, beside: torch.Tensor) -> Widening:
        """How its pages become numbers, with what lies beside them."""
        format = self.matrix(machine.shape).format
        assert isinstance(format, Packed)
        return Widening(format, beside)
