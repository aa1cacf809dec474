"""Norm + gate/up + SwiGLU, for a run of row blocks.

    h = round(rms_norm(x_mid[layer], w))
    g = W_gate h + b_gate,  u = W_up h + b_up,  mlp[layer] = g * sigmoid(g) * u          (Shazeer, 2020)

A row block packs 8 gate rows and the 8 up rows of the same units, so the product needs nothing from another SM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.matvec import matrix_input, rms_norm, row_blocks
from instructions.shape import Shape, ceil_div
from models.tape import BLOCK_ROWS, PAGE_BYTES

UNITS = BLOCK_ROWS // 2  # MLP units a row block makes
LANES = 64  # multiple of every vector loop's step: torch takes what is left over through another exp, with other bits


@dataclass(frozen=True)
class GateUp(Instruction):
    """Row blocks `block` to `block + blocks` of the layer's gate/up matrix."""

    OPCODE = 6
    MNEMONIC = "gate_up"

    block: int
    blocks: int

    def reads(self, shape: Shape) -> tuple[Region, ...]:
        return (Region("x_mid", self.layer, 0, shape.config.hidden_size),)

    def writes(self, shape: Shape) -> tuple[Region, ...]:
        stop = min((self.block + self.blocks) * UNITS, shape.config.intermediate_size)
        return (Region("mlp", self.layer, self.block * UNITS, stop),)

    def page_uses(self, shape: Shape) -> int:
        return self.blocks * shape.matrix("gate_up", self.layer).pages_per_block

    def tape_page(self, shape: Shape) -> int:
        matrix = shape.matrix("gate_up", self.layer)
        return matrix.first_page + self.block * matrix.pages_per_block

    def cost(self, shape: Shape, past: int) -> Cost:
        return Cost(self.page_uses(shape) * PAGE_BYTES, 2 * self.page_uses(shape) * shape.page_elements)

    def execute(self, machine: Machine) -> Pages:
        shape, config = machine.shape, machine.shape.config
        matrix = shape.matrix("gate_up", self.layer)
        norm = machine.constants(shape.tape.norm_offset("mlp", self.layer), config.hidden_size)
        h = rms_norm(machine.read(self.reads(shape)[0]), norm, config.rms_eps)
        x = matrix_input(h, shape, matrix.pages_per_block * shape.page_columns)
        y = yield from row_blocks(machine, x, self.blocks, matrix.pages_per_block)
        if matrix.bias_offset >= 0:
            bias = machine.constants(matrix.bias_offset + self.block * BLOCK_ROWS, self.blocks * BLOCK_ROWS)
            y = y + bias.view(self.blocks, BLOCK_ROWS)
        gate, up = y[:, :UNITS].flatten(), y[:, UNITS:].flatten()
        region = self.writes(shape)[0]
        machine.write(region, swiglu(gate, up)[: region.stop - region.start])


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(gate) * up, fp32 [n]; an element's bits do not depend on its place or on n."""
    padded = torch.zeros(ceil_div(gate.numel(), LANES) * LANES)
    padded[: gate.numel()] = gate
    return gate * torch.sigmoid(padded)[: gate.numel()] * up
