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

from instructions.base import Activation, Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.matvec import RowBlocks
from models.tape import BLOCK_ROWS

HALF = BLOCK_ROWS // 2


@dataclass(frozen=True)
class Qkv(RowBlocks):
    """Row blocks `block` to `block + blocks` of the layer's QKV matrix, none of them across a part's edge."""

    OPCODE = 2
    MNEMONIC = "qkv"
    MATRIX = "qkv"
    LAYERED = True
    BRINGS = (Activation("q", lambda shape: shape.query_rows), Activation("new_kv", lambda shape: shape.new_rows))

    @classmethod
    def parts(cls, shape: Dimensions, layer: int) -> list[int]:
        """For each KV head its queries, then its keys and values: who reads one does not read the other."""
        return [shape.config.group * shape.head_blocks, 2 * shape.head_blocks] * shape.config.num_kv_heads

    @staticmethod
    def destination(shape: Dimensions, block: int) -> tuple[str, int, bool]:
        """Activation buffer and first row that a row block writes, and whether its rows are RoPE pairs."""
        group, dp = shape.config.group, shape.head_rows
        slot, inner = divmod(block, shape.head_blocks)
        head, part = divmod(slot, group + 2)
        if part < group:
            return "q", (head * group + part) * dp + inner * BLOCK_ROWS, True
        return "new_kv", (head * 2 + part - group) * dp + inner * BLOCK_ROWS, part == group

    def misfit(self, shape: Dimensions) -> str | None:
        one_run = [region.buffer for region in self.outputs(shape)] in (["q"], ["new_kv"])
        return None if one_run else "its row blocks run across the edge between query and key/value rows"

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x", self.layer, 0, shape.config.hidden_size),)

    def outputs(self, shape: Dimensions) -> tuple[Region, ...]:
        """Runs of rows of "q" and "new_kv" that the blocks make, in their order."""
        regions: list[Region] = []
        for block in range(self.block, self.block + self.blocks):
            buffer, row, _ = self.destination(shape, block)
            goes_on = regions and regions[-1].buffer == buffer and regions[-1].stop == row
            first = regions.pop().start if goes_on else row
            regions.append(Region(buffer, self.layer, first, row + BLOCK_ROWS))
        return tuple(regions)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        outputs = self.outputs(shape)
        cached = (Region("kv", self.layer, new.start, new.stop) for new in outputs if new.buffer == "new_kv")
        return (*outputs, *cached)

    def execute(self, machine: Machine) -> Pages:
        shape = machine.shape
        y = yield from self.product(machine, self.normed(machine, "attention"))
        y = torch.where(self.pairs(shape), rotated(y, self.angles(shape, machine.rope())), y).flatten()
        regions = self.outputs(shape)
        for region, rows in zip(regions, y.split([region.stop - region.start for region in regions]), strict=True):
            machine.write(region, rows)
            if region.buffer == "new_kv":
                machine.write(Region("kv", self.layer, region.start, region.stop), rows)

    def pairs(self, shape: Dimensions) -> torch.Tensor:
        """Which of the blocks hold RoPE pairs, bool [blocks, 1]."""
        flags = [self.destination(shape, block)[2] for block in range(self.block, self.block + self.blocks)]
        return torch.tensor(flags)[:, None]

    def angles(self, shape: Dimensions, rope: torch.Tensor) -> torch.Tensor:
        """The part of `rope` [dp / 2, 2] that belongs to each block, [blocks, 8, 2]."""
        inner = torch.arange(self.block, self.block + self.blocks) % shape.head_blocks
        return rope.view(shape.head_blocks, HALF, 2)[inner]


def rotated(y: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Row blocks [blocks, 16] of pairs (j, j + 8), turned by angles [blocks, 8, 2] (cosine, sine)."""
    cos, sin = angles.unbind(2)
    low, high = y[:, :HALF], y[:, HALF:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1)
