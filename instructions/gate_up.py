"""Norm + gate/up + SwiGLU, for a run of row blocks.

    h = round(rms_norm(x_mid[layer], w))
    g = W_gate h + b_gate,  u = W_up h + b_up,  mlp[layer] = g * sigmoid(g) * u          (Shazeer, 2020)

A row block packs 8 gate rows and the 8 up rows of the same units, so the product needs nothing from another SM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Activation, Machine, Pages, Region
from instructions.dimensions import Dimensions, ceil_div
from instructions.matvec import RowBlocks
from models.tape import BLOCK_ROWS

UNITS = BLOCK_ROWS // 2  # MLP units a row block makes
LANES = 64  # multiple of every vector loop's step: torch takes what is left over through another exp, with other bits


@dataclass(frozen=True)
class GateUp(RowBlocks):
    """Row blocks `block` to `block + blocks` of the layer's gate/up matrix."""

    OPCODE = 6
    MNEMONIC = "gate_up"
    MATRIX = "gate_up"
    LAYERED, SHORT = True, True
    BRINGS = (Activation("mlp", lambda shape: 0 if shape.config.num_experts else shape.config.intermediate_size),)

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x_mid", self.layer, 0, shape.config.hidden_size),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        stop = min((self.block + self.blocks) * UNITS, shape.config.intermediate_size)
        return (Region("mlp", self.layer, self.block * UNITS, stop),)

    def execute(self, machine: Machine) -> Pages:
        y = yield from self.product(machine, self.normed(machine))
        gate, up = y[:, :UNITS].flatten(), y[:, UNITS:].flatten()
        region = self.writes(machine.shape)[0]
        machine.write(region, swiglu(gate, up)[: region.stop - region.start])


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(gate) * up, fp32 [n]; an element's bits do not depend on its place or on n."""
    padded = torch.zeros(ceil_div(gate.numel(), LANES) * LANES)
    padded[: gate.numel()] = gate
    return gate * torch.sigmoid(padded)[: gate.numel()] * up
