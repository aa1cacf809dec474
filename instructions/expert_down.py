"""Down projections of the chosen experts + residual, for a run of row blocks:

    x[layer + 1][rows] = x_mid[layer][rows] + m * sum_j W_down,e_j[rows] round(expert_mlp[layer][j])        j: slots 0 to k - 1

expert_mlp holds the router's weights already, so this is one product: a row block's pages are those of slot 0, then those of
slot 1, and so on, each padded to whole pages.  Every output row has one owner, and its sum one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.experts import ExpertRows
from instructions.matvec import Widening, matrix_input, row_blocks
from models.tape import BLOCK_ROWS


@dataclass(frozen=True)
class ExpertDown(ExpertRows):
    """Row blocks `block` to `block + blocks` of the down matrices of all slots' experts."""

    OPCODE = 14
    MNEMONIC = "expert_down"
    MATRIX = "expert_down"

    def slots(self, shape: Dimensions) -> range:
        return range(shape.config.experts_per_token)

    def rows(self, shape: Dimensions) -> tuple[int, int]:
        """Output rows [start, stop), without the padding of the last block."""
        return self.block * BLOCK_ROWS, min((self.block + self.blocks) * BLOCK_ROWS, shape.config.hidden_size)

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        units = shape.config.experts_per_token * shape.config.intermediate_size
        source = Region("expert_mlp", self.layer, 0, units)
        return (source, Region("x_mid", self.layer, *self.rows(shape)), *self.selects(shape))

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x", self.layer + 1, *self.rows(shape)),)

    def page_uses(self, shape: Dimensions) -> int:
        return super().page_uses(shape) * shape.config.experts_per_token

    def place(self, shape: Dimensions, use: int) -> tuple[int, int]:
        pages = self.matrix(shape).pages_per_block
        block, within = divmod(use, pages * shape.config.experts_per_token)
        slot, page = divmod(within, pages)
        return slot, block * pages + page

    @classmethod
    def staged_columns(cls, shape: Dimensions) -> int:
        return super().staged_columns(shape) * shape.config.experts_per_token

    def execute(self, machine: Machine) -> Pages:
        shape, matrix = machine.shape, self.matrix(machine.shape)
        source, residual = (machine.read(region) for region in self.reads(shape)[:2])
        slots = source.view(shape.config.experts_per_token, -1)
        width = matrix.pages_per_block * matrix.format.columns
        x = torch.cat([matrix_input(values, shape, width) for values in slots])
        pages = matrix.pages_per_block * len(slots)
        y = yield from row_blocks(machine, x, self.blocks, pages, self.widening(machine))
        added = y.flatten()[: residual.numel()] * shape.config.residual_multiplier
        machine.write(self.writes(shape)[0], residual + added)

    def widening(self, machine: Machine) -> Widening | None:
        if self.matrix(machine.shape).format.plain:
            return None
        parts = [self.beside(machine, expert, self.block, self.blocks) for expert in self.experts(machine)]
        return self.widened(machine, torch.cat(parts, dim=1))
