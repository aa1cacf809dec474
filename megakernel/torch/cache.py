"""The KV cache of the plain PyTorch backend: rows of all layers, and the view that one sequence has of them.

What is read is always dense in memory, wherever the rows lie, so that a sequence's numbers do not depend on its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megakernel.parts import BLOCK
from models.config import ModelConfig


class Cache:
    """Keys and values of `blocks` blocks of rows: `rows` [layers, 2, kv_heads, blocks * BLOCK, head_dim]."""

    def __init__(self, config: ModelConfig, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, 2, config.num_kv_heads, blocks * BLOCK, config.head_dim)
        self.rows = torch.empty(shape, dtype=dtype, device=device)

    def copy(self, source: int, target: int) -> None:
        """Copy the rows of one block to another."""
        start, end = source * BLOCK, target * BLOCK
        self.rows[:, :, :, end : end + BLOCK] = self.rows[:, :, :, start : start + BLOCK]

    def part(self, blocks: Sequence[int]) -> CachePart:
        """The rows of these blocks, in this order."""
        return CachePart(self.rows, blocks)


class CachePart:
    """One sequence's rows, by its positions."""

    def __init__(self, rows: Tensor, blocks: Sequence[int]) -> None:
        self.rows = rows
        self.runs: list[tuple[int, int, int]] = []  # first position, the one behind the last, first row
        for place, block in enumerate(blocks):
            start, stop, row = self.runs[-1] if self.runs else (0, 0, -1)
            if row + stop - start == block * BLOCK:
                self.runs[-1] = (start, stop + BLOCK, row)
            else:
                self.runs.append((place * BLOCK, (place + 1) * BLOCK, block * BLOCK))

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """The positions from `start` to `stop`, counted from `start`, and the rows where they lie, piece by piece."""
        for first, behind, row in self.runs:
            low, high = max(first, start), min(behind, stop)
            if low < high:
                yield slice(low - start, high - start), slice(row + low - first, row + high - first)

    def write(self, layer: int, past: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim] of the positions from `past` on."""
        for places, rows in self.pieces(past, past + len(key)):
            for kind, new in enumerate((key, value)):
                self.rows[layer, kind, :, rows] = new[places].transpose(0, 1)

    def read(self, layer: int, end: int, dtype: torch.dtype) -> Tensor:
        """Keys and values of the positions before `end`: dense, [2, kv_heads, end, head_dim]."""
        _, kinds, heads, _, dim = self.rows.shape
        dense = self.rows.new_empty((kinds, heads, end, dim), dtype=dtype)
        for places, rows in self.pieces(0, end):
            dense[:, :, places] = self.rows[layer, :, :, rows]
        return dense
