"""Norm + router of a mixture of experts, for a run of row blocks: how well each expert suits the token.

    h = round(rms_norm(x_mid[layer], w)),  scores[layer] = W_router h          W_router: [experts, hidden], plain in any format

The scores are the logits of the softmax that `Choose` takes; the norm is that before the experts, whose input h is too.  It is
cut like any matrix, because one SM would need as long for it as a layer's experts take all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Activation, Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.matvec import RowBlocks
from models.tape import BLOCK_ROWS


@dataclass(frozen=True)
class Router(RowBlocks):
    """Row blocks `block` to `block + blocks` of the layer's router."""

    OPCODE = 11
    MNEMONIC = "router"
    MATRIX = "router"
    LAYERED, SHORT = True, True
    BRINGS = (Activation("scores", lambda shape: shape.config.num_experts),)

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x_mid", self.layer, 0, shape.config.hidden_size),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        stop = min((self.block + self.blocks) * BLOCK_ROWS, shape.config.num_experts)
        return (Region("scores", self.layer, self.block * BLOCK_ROWS, stop),)

    def execute(self, machine: Machine) -> Pages:
        y = yield from self.product(machine, self.normed(machine))
        region = self.writes(machine.shape)[0]
        machine.write(region, y.flatten()[: region.stop - region.start])
