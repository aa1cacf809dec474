"""Projection + residual, for a run of row blocks: what the output and the down projection have in common.

    y[rows] = residual[rows] + (W[rows] round(source) + b[rows]) * residual_multiplier

Every output row has one owner, so the residual stream stays in fp32 with no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from instructions.base import Machine, Pages, Region
from instructions.dimensions import Dimensions, ceil_div
from instructions.matvec import RowBlocks, staged_pages
from models.tape import BLOCK_ROWS


@dataclass(frozen=True)
class Projection(RowBlocks):
    """A run of row blocks of the layer's matrix, its rows added to those of `RESIDUAL`."""

    LAYERED = True
    SOURCE: ClassVar[str]
    APART: ClassVar[bool] = False  # whether every column has its own rows there
    RESIDUAL: ClassVar[str]
    TARGET: ClassVar[str]
    TARGET_LAYER: ClassVar[int]  # added to the layer

    @classmethod
    def staged_columns(cls, shape: Dimensions) -> int:
        matrix = shape.matrix(cls.MATRIX)
        part = staged_pages(matrix.pages_per_block, matrix.format)
        return ceil_div(matrix.pages_per_block, part) * part * matrix.format.columns

    def rows(self, shape: Dimensions) -> tuple[int, int]:
        """Output rows [start, stop), without the padding of the last block."""
        return self.block * BLOCK_ROWS, min((self.block + self.blocks) * BLOCK_ROWS, shape.config.hidden_size)

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        source = Region(
            self.SOURCE, self.layer, 0, shape.columns * self.matrix(shape).columns if self.APART else self.matrix(shape).columns
        )
        return (source, Region(self.RESIDUAL, self.layer, *self.rows(shape)))

    def source(self, shape: Dimensions, column: int) -> Region:
        """The rows that it multiplies in a column."""
        columns = self.matrix(shape).columns
        first = column * columns if self.APART else 0
        return Region(self.SOURCE, self.layer, first, first + columns)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region(self.TARGET, self.layer + self.TARGET_LAYER, *self.rows(shape)),)

    def execute(self, machine: Machine) -> Pages:
        source, residual = (
            machine.read(region) for region in (self.source(machine.shape, machine.column), self.reads(machine.shape)[1])
        )
        y = (yield from self.product(machine, source)).flatten() * machine.shape.config.residual_multiplier
        machine.write(self.writes(machine.shape)[0], residual + y[: residual.numel()])
