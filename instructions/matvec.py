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
    shape, together = machine.shape, max(1, HELD_PAGES // pages_per_block)
    out = torch.zeros(blocks, BLOCK_ROWS)
    chunks = list(x.split(HELD_PAGES * shape.page_columns))
    staged: dict[tuple[int, int], Staged] = {}
    for block in range(0, blocks, together):
        group = min(together, blocks - block)
        sums = out[block : block + group].unbind()
        for part, chunk in enumerate(chunks):
            page = part * HELD_PAGES
            count = min(HELD_PAGES, pages_per_block - page)
            if (group, count) not in staged:
                staged[group, count] = Staged(shape, group, count)
            stage = staged[group, count]
            pages = yield PageRequest(block * pages_per_block + page, group * count)
            stage.tiles.copy_(pages.view(stage.tiles.shape))
            for total, rows in zip(sums, stage.rows, strict=True):
                total.addmv_(rows, chunk)
    return out


class Staged:
    """Room for `blocks` row blocks of `pages` pages each in fp32: filled as `tiles`, [blocks, tiles, 16, tile columns] as in a
    page, read as `rows`, each [16, columns]."""

    def __init__(self, shape: Shape, blocks: int, pages: int) -> None:
        values = torch.empty(blocks, BLOCK_ROWS, pages * TILES_PER_PAGE, shape.tile_columns)
        self.tiles = values.transpose(1, 2)
        self.rows = values.flatten(2).unbind()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * weight / sqrt(mean(x^2) + eps), all fp32 [hidden]  (Zhang and Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean() + eps) * weight
