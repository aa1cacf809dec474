"""The piece that all projections share: row blocks of 16, streamed page by page, times one activation vector."""

from __future__ import annotations

from collections.abc import Generator, Sequence

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
    out = torch.zeros(blocks, BLOCK_ROWS)
    together = max(1, HELD_PAGES // pages_per_block)
    stages: list[Stage] = []
    for block in range(0, blocks, together):
        group = min(together, blocks - block)
        if not stages or group != stages[0].blocks:
            stages = [Stage(machine.shape, x, group, page, pages_per_block) for page in range(0, pages_per_block, HELD_PAGES)]
        sums = out[block : block + group].unbind()
        for stage in stages:
            pages = yield PageRequest(block * pages_per_block + stage.page, stage.count)
            stage.add_product(pages, sums)
    return out


class Stage:
    """One request of `row_blocks`: up to HELD_PAGES pages, from `page` along K, of `blocks` row blocks; with room in fp32."""

    def __init__(self, shape: Shape, x: torch.Tensor, blocks: int, page: int, pages_per_block: int) -> None:
        pages = min(HELD_PAGES, pages_per_block - page)
        self.blocks, self.page, self.count = blocks, page, blocks * pages
        self.x = x[page * shape.page_columns : (page + pages) * shape.page_columns]
        values = torch.empty(blocks, BLOCK_ROWS, pages * TILES_PER_PAGE, shape.tile_columns)
        self.rows = values.flatten(2).unbind()  # [16, columns] each
        self.tiles = values.transpose(1, 2)  # the same, as in a page: [blocks, tiles, 16, tile columns]
        self.shape = self.tiles.shape

    def add_product(self, pages: torch.Tensor, sums: Sequence[torch.Tensor]) -> None:
        """Add the pages' part of the products to `sums`, [16] for each row block."""
        self.tiles.copy_(pages.view(self.shape))
        for total, rows in zip(sums, self.rows, strict=True):
            total.addmv_(rows, self.x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * weight / sqrt(mean(x^2) + eps), all fp32 [hidden]  (Zhang and Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean() + eps) * weight
