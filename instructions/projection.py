"""Projection + residual, for a run of row blocks: what the output and the down projection have in common.

    y[rows] = residual[rows] + W[rows] round(source) + b[rows]

Every output row has one owner, so the residual stream stays in fp32 with no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.matvec import matrix_input, row_blocks
from instructions.shape import Shape
from models.tape import BLOCK_ROWS, PAGE_BYTES


@dataclass(frozen=True)
class Projection(Instruction):
    """Row blocks `block` to `block + blocks` of the layer's matrix of kind `MATRIX`."""

    MATRIX: ClassVar[str]
    SOURCE: ClassVar[str]
    RESIDUAL: ClassVar[str]
    TARGET: ClassVar[str]
    TARGET_LAYER: ClassVar[int]  # added to the layer

    block: int
    blocks: int

    def rows(self, shape: Shape) -> tuple[int, int]:
        """Output rows [start, stop), without the padding of the last block."""
        return self.block * BLOCK_ROWS, min((self.block + self.blocks) * BLOCK_ROWS, shape.config.hidden_size)

    def reads(self, shape: Shape) -> tuple[Region, ...]:
        source = Region(self.SOURCE, self.layer, 0, shape.buffers[self.SOURCE].rows)
        return (source, Region(self.RESIDUAL, self.layer, *self.rows(shape)))

    def writes(self, shape: Shape) -> tuple[Region, ...]:
        return (Region(self.TARGET, self.layer + self.TARGET_LAYER, *self.rows(shape)),)

    def page_uses(self, shape: Shape) -> int:
        return self.blocks * shape.matrix(self.MATRIX, self.layer).pages_per_block

    def tape_page(self, shape: Shape) -> int:
        matrix = shape.matrix(self.MATRIX, self.layer)
        return matrix.first_page + self.block * matrix.pages_per_block

    def cost(self, shape: Shape, past: int) -> Cost:
        return Cost(self.page_uses(shape) * PAGE_BYTES, 2 * self.page_uses(shape) * shape.page_elements)

    def execute(self, machine: Machine) -> Pages:
        shape = machine.shape
        matrix = shape.matrix(self.MATRIX, self.layer)
        source, residual = (machine.read(region) for region in self.reads(shape))
        x = matrix_input(source, shape, matrix.pages_per_block * shape.page_columns)
        y = (yield from row_blocks(machine, x, self.blocks, matrix.pages_per_block)).flatten()
        if matrix.bias_offset >= 0:
            y = y + machine.constants(matrix.bias_offset + self.block * BLOCK_ROWS, y.numel())
        machine.write(self.writes(shape)[0], residual + y[: residual.numel()])
