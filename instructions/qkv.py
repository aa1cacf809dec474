"""Norm + QKV + RoPE + KV append, for a run of row blocks of one KV head's group.

    h = round(rms_norm(x[layer], w))                               x: [hidden] fp32, h: the weight type
    y = W_qkv h + b                                                W_qkv: [packed rows, hidden], y: fp32
    queries and keys: (y_i, y_{i + d/2}) rotated by the angle position * frequency_i   (Su et al., 2021; rotate-half form)
    queries -> q[layer] (fp32); keys and values -> new_kv[layer] (fp32) for this token, and the cache row of the current
    position (the weight type) for later ones

Norm, rotation and append are merged into the projection because each is a function of the block's own 16 rows: the tape
packs both halves of a RoPE pair into one block (rows j and j + 8), so nothing crosses SMs and a dependency hop is saved.
Every SM repeats the norm, which costs one read of x from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.matvec import matrix_input, rms_norm, row_blocks
from instructions.shape import Shape
from models.tape import BLOCK_ROWS, PAGE_BYTES

HALF = BLOCK_ROWS // 2


@dataclass(frozen=True)
class Qkv(Instruction):
    """Row blocks `block` to `block + blocks` of the layer's QKV matrix, none of them across a part's edge."""

    OPCODE = 2
    MNEMONIC = "qkv"

    block: int
    blocks: int

    @staticmethod
    def destination(shape: Shape, block: int) -> tuple[str, int, bool]:
        """Activation buffer and first row that a row block writes, and whether its rows are RoPE pairs."""
        group, dp = shape.config.group, shape.head_rows
        slot, inner = divmod(block, shape.head_blocks)
        head, part = divmod(slot, group + 2)
        if part < group:
            return "q", (head * group + part) * dp + inner * BLOCK_ROWS, True
        return "new_kv", (head * 2 + part - group) * dp + inner * BLOCK_ROWS, part == group

    def reads(self, shape: Shape) -> tuple[Region, ...]:
        return (Region("x", self.layer, 0, shape.config.hidden_size),)

    def outputs(self, shape: Shape) -> tuple[Region, ...]:
        """Runs of rows of "q" and "new_kv" that the blocks make, in their order."""
        regions: list[Region] = []
        for block in range(self.block, self.block + self.blocks):
            buffer, row, _ = self.destination(shape, block)
            if regions and regions[-1].buffer == buffer and regions[-1].stop == row:
                row = regions.pop().start
                regions.append(Region(buffer, self.layer, row, self.destination(shape, block)[1] + BLOCK_ROWS))
            else:
                regions.append(Region(buffer, self.layer, row, row + BLOCK_ROWS))
        return tuple(regions)

    def writes(self, shape: Shape) -> tuple[Region, ...]:
        outputs = self.outputs(shape)
        cached = (Region("kv", self.layer, new.start, new.stop) for new in outputs if new.buffer == "new_kv")
        return (*outputs, *cached)

    def page_uses(self, shape: Shape) -> int:
        return self.blocks * shape.matrix("qkv", self.layer).pages_per_block

    def tape_page(self, shape: Shape) -> int:
        matrix = shape.matrix("qkv", self.layer)
        return matrix.first_page + self.block * matrix.pages_per_block

    def cost(self, shape: Shape, past: int) -> Cost:
        return Cost(self.page_uses(shape) * PAGE_BYTES, 2 * self.page_uses(shape) * shape.page_elements)

    def execute(self, machine: Machine) -> Pages:
        shape, config = machine.shape, machine.shape.config
        matrix = shape.matrix("qkv", self.layer)
        norm = machine.constants(shape.tape.norm_offset("attention", self.layer), config.hidden_size)
        h = rms_norm(machine.read(self.reads(shape)[0]), norm, config.rms_eps)
        x = matrix_input(h, shape, matrix.pages_per_block * shape.page_columns)
        y = yield from row_blocks(machine, x, self.blocks, matrix.pages_per_block)
        if matrix.bias_offset >= 0:
            bias = machine.constants(matrix.bias_offset + self.block * BLOCK_ROWS, self.blocks * BLOCK_ROWS)
            y = y + bias.view(self.blocks, BLOCK_ROWS)
        y = torch.where(self.pairs(shape), rotated(y, self.angles(shape, machine.rope())), y).flatten()
        regions = self.outputs(shape)
        for region, rows in zip(regions, y.split([region.stop - region.start for region in regions]), strict=True):
            machine.write(region, rows)
            if region.buffer == "new_kv":
                machine.write(Region("kv", self.layer, region.start, region.stop), rows)

    def pairs(self, shape: Shape) -> torch.Tensor:
        """Which of the blocks hold RoPE pairs, bool [blocks, 1]."""
        flags = [self.destination(shape, block)[2] for block in range(self.block, self.block + self.blocks)]
        return torch.tensor(flags)[:, None]

    def angles(self, shape: Shape, rope: torch.Tensor) -> torch.Tensor:
        """The part of `rope` [dp / 2, 2] that belongs to each block, [blocks, 8, 2]."""
        inner = torch.arange(self.block, self.block + self.blocks) % shape.head_blocks
        return rope.view(shape.head_blocks, HALF, 2)[inner]


def rotated(y: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Row blocks [blocks, 16] of pairs (j, j + 8), turned by angles [blocks, 8, 2] (cosine, sine)."""
    cos, sin = angles.unbind(2)
    low, high = y[:, :HALF], y[:, HALF:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1)
