"""Norm + QKV + RoPE + KV append, for a run of row blocks of one KV head's group.

    h = round(rms_norm(x[layer], w))                               x: [hidden] fp32, h: the weight type
    y = W_qkv h + b                                                W_qkv: [packed rows, hidden], y: fp32
    queries and keys of models with norms of heads: the block's sum of y_i^2 -> squares[layer], and y_i w_i for y_i
    queries and keys: (y_i, y_{i + d/2}) rotated by the angle position * frequency_i   (Su et al., 2021; rotate-half form)
    queries -> q[layer] (fp32); keys and values -> new_kv[layer] (fp32) for this token, and the cache row of the current
    position (the weight type) for later ones; normed keys are not whole here, so that `Attention` writes their rows

Norm, rotation and append are merged into the projection because each is a function of the block's own 16 rows: the tape
packs both halves of a RoPE pair into one block (rows j and j + 8), so nothing crosses SMs and a dependency hop is saved.
Every SM repeats the norm, which costs one read of x from L2.

The norm of a head needs the mean of y^2 over the head, whose blocks lie on several SMs.  But it is one number a head, and the
rotation commutes with it, so whoever reads the head multiplies by it; only the weights, one a dimension, come before the
rotation, and they are the block's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
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
    BRINGS = (
        Activation("q", lambda shape: shape.query_rows),
        Activation("new_kv", lambda shape: shape.new_rows),
        Activation("squares", lambda shape: shape.config.num_kv_heads * shape.group_squares),
    )

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

    def destinations(self, shape: Dimensions) -> list[tuple[str, int, bool]]:
        """`destination` of every row block."""
        return [self.destination(shape, block) for block in range(self.block, self.block + self.blocks)]

    def outputs(self, shape: Dimensions) -> tuple[Region, ...]:
        """Runs of rows of "q" and "new_kv" that the blocks make, in their order."""
        places = self.destinations(shape)
        return tuple(merged(Region(buffer, self.layer, row, row + BLOCK_ROWS) for buffer, row, _ in places))

    def normed_blocks(self, shape: Dimensions) -> list[bool]:
        """Which of the blocks belong to heads that are normed: queries and keys, if any."""
        return [shape.head_norms and pairs for _, _, pairs in self.destinations(shape)]

    def squares(self, shape: Dimensions) -> tuple[Region, ...]:
        """Runs of rows of "squares" that the blocks make, one for each that is normed."""
        per_head = shape.head_blocks * (shape.config.group + 2)
        places = (divmod(self.block + i, per_head) for i, normed in enumerate(self.normed_blocks(shape)) if normed)
        rows = (head * shape.group_squares + inner for head, inner in places)
        return tuple(merged(Region("squares", self.layer, row, row + 1) for row in rows))

    def cached_blocks(self, shape: Dimensions) -> list[bool]:
        """Which of the blocks go to the cache from here: values, and keys that are not normed."""
        normed = self.normed_blocks(shape)
        return [buffer == "new_kv" and not n for (buffer, _, _), n in zip(self.destinations(shape), normed, strict=True)]

    def cached(self, shape: Dimensions, sequence: int) -> tuple[Region, ...]:
        """Runs of rows of a sequence's cache that the blocks make."""
        first = sequence * shape.new_rows
        places = zip(self.destinations(shape), self.cached_blocks(shape), strict=True)
        rows = (first + row for (_, row, _), cached in places if cached)
        return tuple(merged(Region("kv", self.layer, row, row + BLOCK_ROWS) for row in rows))

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        cached = chain.from_iterable(self.cached(shape, sequence) for sequence in range(shape.sequences))
        return (*self.outputs(shape), *self.squares(shape), *cached)

    def execute(self, machine: Machine) -> Pages:
        shape = machine.shape
        y = yield from self.product(machine, self.normed(machine))
        if shape.head_norms:
            normed = torch.tensor(self.normed_blocks(shape))
            write_runs(machine, self.squares(shape), y[normed].square().sum(1))
            y = torch.where(normed[:, None], y * self.head_weights(machine), y)
        y = torch.where(self.pairs(shape), rotated(y, self.angles(shape, machine.rope())), y)
        write_runs(machine, self.outputs(shape), y.flatten())
        write_runs(
            machine, self.cached(shape, machine.column // shape.depth), y[torch.tensor(self.cached_blocks(shape))].flatten()
        )

    def head_weights(self, machine: Machine) -> torch.Tensor:
        """The norm weights of every block's dimensions, [blocks, 16]; for values, which have none, those of keys."""
        shape, group = machine.shape, machine.shape.config.group
        matrix = shape.matrix("qkv", self.layer)
        weights = machine.constants(matrix.head_norm_offset, sum(matrix.head_norm_heads) * shape.head_rows)
        slot, inner = divmod(torch.arange(self.block, self.block + self.blocks).numpy(), shape.head_blocks)
        head, part = divmod(slot, group + 2)
        keys = part >= group
        if shape.norms_together:
            heads = np.where(keys, shape.config.num_heads + head, head * group + part)
        else:
            heads = keys.astype(int)
        return weights.view(-1, shape.head_blocks, BLOCK_ROWS)[heads, inner]

    def pairs(self, shape: Dimensions) -> torch.Tensor:
        """Which of the blocks hold RoPE pairs, bool [blocks, 1]."""
        return torch.tensor([pairs for _, _, pairs in self.destinations(shape)])[:, None]

    def angles(self, shape: Dimensions, rope: torch.Tensor) -> torch.Tensor:
        """The part of `rope` [dp / 2, 2] that belongs to each block, [blocks, 8, 2]."""
        inner = torch.arange(self.block, self.block + self.blocks) % shape.head_blocks
        return rope.view(shape.head_blocks, HALF, 2)[inner]


def merged(regions: Iterable[Region]) -> Iterator[Region]:
    """Regions of one layer, those that follow each other in one."""
    last: Region | None = None
    for region in regions:
        if last and (last.buffer, last.stop) == (region.buffer, region.start):
            last = Region(last.buffer, last.layer, last.start, region.stop)
        else:
            if last:
                yield last
            last = region
    if last:
        yield last


def write_runs(machine: Machine, regions: Sequence[Region], values: torch.Tensor) -> None:
    """Write the rows of some regions, one behind another in `values` [rows of all]."""
    for region, rows in zip(regions, values.split([region.stop - region.start for region in regions]), strict=True):
        machine.write(region, rows)


def rotated(y: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Row blocks [blocks, 16] of pairs (j, j + 8), turned by angles [blocks, 8, 2] (cosine, sine)."""
    cos, sin = angles.unbind(2)
    low, high = y[:, :HALF], y[:, HALF:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1)
