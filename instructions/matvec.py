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

    Every row is summed in the same order whatever the block count, so a result never depends on the schedule: one
    matrix-vector product of a fixed shape for each block and HELD_PAGES pages of it.  Blocks of fewer pages share a request.
    """
    columns, out = machine.shape.page_columns, []
    together = max(1, HELD_PAGES // pages_per_block)
    for block in range(0, blocks, together):
        group = min(together, blocks - block)
        sums: list[torch.Tensor] = []
        for page in range(0, pages_per_block, HELD_PAGES):
            count = min(HELD_PAGES, pages_per_block - page)
            pages = yield PageRequest(block * pages_per_block + page, group * count)
            tiles = pages.view(group, count * TILES_PER_PAGE, BLOCK_ROWS, -1)
            weights = torch.empty(group, BLOCK_ROWS, tiles.shape[1], tiles.shape[3])
            weights.copy_(tiles.transpose(1, 2))
            chunk = x[page * columns : (page + count) * columns]
            products = [torch.mv(rows, chunk) for rows in weights.flatten(2).unbind()]
            sums = [a + b for a, b in zip(sums, products, strict=True)] if sums else products
        out.extend(sums)
    return torch.stack(out)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * weight / sqrt(mean(x^2) + eps), all fp32 [hidden]  (Zhang and Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean() + eps) * weight
