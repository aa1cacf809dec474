"""What all projections share: row blocks of 16, streamed page by page, times one activation vector.

`RowBlocks` is the base of the instructions that multiply a matrix of the weight tape.  Each says which matrix, what it
multiplies and what becomes of the product.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from instructions.base import Cost, Instruction, Machine, PageRequest
from instructions.dimensions import HELD_PAGES, Dimensions, next_power_of_two
from models.formats import Packed, WeightFormat
from models.tape import BLOCK_ROWS, PAGE_BYTES, TILES_PER_PAGE, Matrix

STAGED = 2048  # columns of an activation vector that are staged together
STAGED_QUANTISED = 8192  # the same where pages take less time than staging
DTYPES = {2: torch.bfloat16, 4: torch.float32}
Product = Generator[PageRequest, torch.Tensor, torch.Tensor]


def staged_pages(pages: int, format: WeightFormat) -> int:
    """Pages of a row block of so many whose part of an activation vector is staged together, a power of two.

    The last part may have fewer pages, of a vector padded to whole parts: page by page, staging takes longer than streaming.
    """
    together = (STAGED if format.plain else STAGED_QUANTISED) // format.columns
    most = max(1, min(together, next_power_of_two(pages)))
    divisor = min(most, pages & -pages)
    return divisor if 2 * divisor >= most else most


@dataclass(frozen=True)
class RowBlocks(Instruction):
    """Row blocks `block` to `block + blocks` of the matrix of kind `MATRIX`."""

    MATRIX: ClassVar[str]

    block: int
    blocks: int

    @classmethod
    def foreign(cls, shape: Dimensions) -> str | None:
        there = cls.MATRIX in (*shape.tape.kinds, "head")
        return None if there else f"multiplies {cls.MATRIX}, a matrix that the model does not have"

    @classmethod
    def parts(cls, shape: Dimensions, layer: int) -> list[int]:
        """Row blocks of the matrix, cut where no run may cross: how many there are in each part, in order."""
        return [shape.matrix(cls.MATRIX, layer).blocks]

    def matrix(self, shape: Dimensions) -> Matrix:
        """The matrix that it multiplies by some rows of."""
        return shape.matrix(self.MATRIX, self.layer)

    @classmethod
    def staged_columns(cls, shape: Dimensions) -> int:
        """Columns of what it multiplies, padded to whole pages, as it is staged."""
        matrix = shape.matrix(cls.MATRIX)
        return matrix.pages_per_block * matrix.format.columns

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        blocks = self.matrix(shape).blocks
        return {"block": (0, blocks - 1), "blocks": (1, blocks - self.block)}

    def page_uses(self, shape: Dimensions) -> int:
        return self.blocks * self.matrix(shape).pages_per_block

    def tape_page(self, shape: Dimensions) -> int:
        matrix = self.matrix(shape)
        return matrix.first_page + self.block * matrix.pages_per_block

    def cost(self, shape: Dimensions, past: int) -> Cost:
        pages, format = self.page_uses(shape), self.matrix(shape).format
        return Cost(pages * (PAGE_BYTES + 4 * format.scale_words), 2 * pages * format.columns * BLOCK_ROWS)

    def normed(self, machine: Machine) -> torch.Tensor:
        """The hidden state that it reads, times the norm that comes before its matrix: fp32 [hidden]."""
        config, tape, (region, *_) = machine.shape.config, machine.shape.tape, self.reads(machine.shape)
        weight = machine.constants(tape.norm_offset(tape.norm_before(self.MATRIX), self.layer), config.hidden_size)
        return rms_norm(machine.read(region), weight, config.rms_eps)

    def product(self, machine: Machine, values: torch.Tensor) -> Product:
        """W round(values) + b for its rows, from `values` [columns] fp32; returns [blocks, 16] fp32."""
        matrix = self.matrix(machine.shape)
        x = matrix_input(values, machine.shape, matrix.pages_per_block * matrix.format.columns)
        y = yield from row_blocks(machine, x, self.blocks, matrix.pages_per_block, self.widening(machine))
        if matrix.bias_offset < 0:
            return y
        bias = machine.constants(matrix.bias_offset + self.block * BLOCK_ROWS, self.blocks * BLOCK_ROWS)
        return y + bias.view(self.blocks, BLOCK_ROWS)

    def widening(self, machine: Machine) -> Widening | None:
        """How its pages become numbers, where they are quantised."""
        matrix = self.matrix(machine.shape)
        if not isinstance(matrix.format, Packed):
            return None
        words = matrix.pages_per_block * matrix.format.scale_words
        beside = machine.constants(matrix.scale_offset + self.block * words, self.blocks * words)
        return Widening(matrix.format, beside.view(self.blocks, matrix.pages_per_block, -1))


class Widening(NamedTuple):
    """A format, and what lies beside the pages of some row blocks, fp32 [blocks, pages, words]."""

    format: Packed
    beside: torch.Tensor

    def rows(self, pages: torch.Tensor, block: int, page: int, into: torch.Tensor) -> None:
        """Widen pages, from `page` along K of row blocks from `block` on, `into` fp32 [blocks, 16, columns]."""
        count = into.shape[2] // self.format.columns
        beside = self.beside[block : block + len(into), page : page + count]
        into.copy_(self.format.rows(pages.view(len(into), count, -1), beside))


def matrix_input(values: torch.Tensor, shape: Dimensions, columns: int) -> torch.Tensor:
    """Round an fp32 activation [n] to the weight type, once, and pad it with zeros to [columns] fp32."""
    padded = torch.zeros(columns)
    padded[: values.numel()] = values.to(DTYPES[shape.itemsize])
    return padded


def row_blocks(
    machine: Machine, x: torch.Tensor, blocks: int, pages_per_block: int, widening: Widening | None = None
) -> Product:
    """Multiply `blocks` row blocks by `x` [pages_per_block * a page's columns]; returns [blocks, 16] fp32.

    Every row is summed in the same order whatever the block count, so a result never depends on the schedule: one
    matrix-vector product of a fixed shape for each block and HELD_PAGES pages of it.  Blocks of fewer pages share a request.
    """
    out = torch.zeros(blocks, BLOCK_ROWS)
    together = max(1, HELD_PAGES // pages_per_block)
    stages: list[Stage] = []
    for block in range(0, blocks, together):
        group = min(together, blocks - block)
        if not stages or group != stages[0].blocks:
            starts = range(0, pages_per_block, HELD_PAGES)
            stages = [Stage(machine.shape, x, group, page, pages_per_block, widening) for page in starts]
        sums = out[block : block + group].unbind()
        for stage in stages:
            pages = yield PageRequest(block * pages_per_block + stage.page, stage.count)
            stage.add_product(pages, sums, block)
    return out


class Stage:
    """One request of `row_blocks`: up to HELD_PAGES pages, from `page` along K, of `blocks` row blocks; with room in fp32."""

    def __init__(
        self, shape: Dimensions, x: torch.Tensor, blocks: int, page: int, pages_per_block: int, widening: Widening | None
    ) -> None:
        pages = min(HELD_PAGES, pages_per_block - page)
        self.blocks, self.page, self.count = blocks, page, blocks * pages
        self.widening = widening
        columns = shape.page_columns if widening is None else widening.format.columns
        self.x = x[page * columns : (page + pages) * columns]
        self.values = torch.empty(blocks, BLOCK_ROWS, pages * columns)
        self.rows = self.values.unbind()  # [16, columns] each
        tiles = self.values.view(blocks, BLOCK_ROWS, pages * TILES_PER_PAGE, -1)
        self.tiles = tiles.transpose(1, 2)  # the same, as in a plain page: [blocks, tiles, 16, tile columns]
        self.shape = self.tiles.shape

    def add_product(self, pages: torch.Tensor, sums: Sequence[torch.Tensor], block: int) -> None:
        """Add the pages' part of the products to `sums`, [16] for each row block from `block` on."""
        if self.widening is None:
            self.tiles.copy_(pages.view(self.shape))
        else:
            self.widening.rows(pages, block, self.page, self.values)
        for total, rows in zip(sums, self.rows, strict=True):
            total.addmv_(rows, self.x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * weight / sqrt(mean(x^2) + eps), all fp32 [hidden]  (Zhang and Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean() + eps) * weight
