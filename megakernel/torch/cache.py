"""The KV cache of the plain PyTorch backend: rows of all layers, and the view that one sequence has of them.

What is read is always dense in memory, wherever the rows lie, so that a sequence's numbers do not depend on its place.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self.first = blocks[0] * BLOCK
        self.places: Tensor | None = None  # int64 [positions], where they are not in one piece
        if list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
            starts = torch.tensor(blocks, device=rows.device) * BLOCK
            self.places = (starts[:, None] + torch.arange(BLOCK, device=rows.device)).flatten()

    def write(self, layer: int, past: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim] of the positions from `past` on."""
        end = past + len(key)
        where = slice(self.first + past, self.first + end) if self.places is None else self.places[past:end]
        for kind, new in enumerate((key, value)):
            self.rows[layer, kind, :, where] = new.transpose(0, 1).to(self.rows.dtype)

    def read(self, layer: int, end: int, dtype: torch.dtype) -> Tensor:
        """Keys and values of the positions before `end`: dense, [2, kv_heads, end, head_dim]."""
        if self.places is None:
            return self.rows[layer, :, :, self.first : self.first + end].to(dtype).contiguous()
        return self.rows[layer].index_select(2, self.places[:end]).to(dtype)
