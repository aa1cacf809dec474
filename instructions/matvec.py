"""The piece that all projections share: row blocks of 16, streamed page by page, times one activation vector."""

from __future__ import annotations

from collections.abc import Generator

import torch

from instructions.base import Machine, PageRequest
from instructions.shape import HELD_PAGES, Shape
from models.tape import BLOCK_ROWS, TILES_PER_PAGE

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def matrix_input(values: torch.Tensor, shape: Shape, columns: int) -> torch.Tensor:
    """Round an fp32 activation [n] to the weight type, once, and pad it with zeros to [columns] fp32."""
    padded = torch.zeros(columns)
    padded[: values.numel()] = values.to(DTYPES[shape.itemsize])
    return padded


def row_blocks(
    machine: Machine, x: torch.Tensor, blocks: int, pages_per_block: int
) -> Generator[PageRequest, torch.Tensor, torch.Tensor]:
    """Multiply `blocks` row blocks by `x` [pages_per_block * page_columns]; returns [blocks, 16] fp32.

    Every row is summed in the same order whatever the block count, so a result never depends on the schedule: at most
    HELD_PAGES pages at a time, laid out as [16 rows, columns], one matrix-vector product of a fixed shape each.
    """
    columns = machine.shape.page_columns
    out = torch.zeros(blocks, BLOCK_ROWS)
    for block in range(blocks):
        for page in range(0, pages_per_block, HELD_PAGES):
            count = min(HELD_PAGES, pages_per_block - page)
            pages = yield PageRequest(block * pages_per_block + page, count)
            tiles = pages.view(count * TILES_PER_PAGE, BLOCK_ROWS, -1)
            weights = torch.empty(BLOCK_ROWS, tiles.shape[0], tiles.shape[2])
            weights.copy_(tiles.transpose(0, 1))
            chunk = x[page * columns : (page + count) * columns]
            out[block] += torch.mv(weights.view(BLOCK_ROWS, -1), chunk)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * weight / sqrt(mean(x^2) + eps), all fp32 [hidden]  (Zhang and Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean() + eps) * weight
