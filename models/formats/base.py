"""What a weight format is: how many columns a page holds, what lies beside it, and how weights become bits and numbers again.

A page is 16 rows of a matrix in 16 KiB, whatever the format.  Those that widen their weights in registers (`Packed`) keep them
in the order in which a warp's lanes take them, so that widening one 32-bit word gives values side by side in the operand of
the matrix instruction (NVIDIA PTX ISA, mma.m16n8k16): a page is 32 chunks along K, each [8 rows][4 lanes][2 half blocks of
8 rows][2 words], a word holding consecutive columns of one row.  Beside every page lie `scale_words` 32-bit words, which are
numbered and loaded like the page itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE_ROWS = 16
PAGE_WORDS = 4096  # 32-bit words of a page
ROW_WORDS = PAGE_WORDS // PAGE_ROWS


@dataclass(frozen=True)
class Codes:
    """Rows of a matrix as a format keeps them, before they are packed.

    values: uint8 [rows, K], one code a weight; scales: fp32 [rows, K / group]; zeros: uint8 of the same shape, the code that
    stands for 0 in its group, in formats that have one; offsets: fp32 of the same shape, what code 0 stands for, likewise.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    def part(self, rows: slice) -> Codes:
        """Those of some rows."""
        zeros, offsets = (None if tensor is None else tensor[rows] for tensor in (self.zeros, self.offsets))
        return Codes(self.values[rows], self.scales[rows], zeros, offsets)

    def padded(self, columns: int, groups: int) -> Codes:
        """With so many columns and groups of zeros behind."""
        behind = (0, groups)
        zeros, offsets = (
            None if tensor is None else torch.nn.functional.pad(tensor, behind) for tensor in (self.zeros, self.offsets)
        )
        return Codes(
            torch.nn.functional.pad(self.values, (0, columns)), torch.nn.functional.pad(self.scales, behind), zeros, offsets
        )

    @property
    def finite(self) -> bool:
        """Whether all scales and offsets are."""
        return all(bool(tensor.isfinite().all()) for tensor in (self.scales, self.offsets) if tensor is not None)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """All of them, in their order."""
        return self.values, self.scales, self.zeros, self.offsets


@dataclass(frozen=True)
class WeightFormat:
    """`columns` of a page of 16 rows; `scale_words` 32-bit words beside it, none where weights are numbers already."""

    name: str
    columns: int
    scale_words: int = 0
    summed: int = 0  # columns of which the kernel needs the activations' sums
    several: bool = True  # whether programs of several columns multiply it

    @property
    def plain(self) -> bool:
        """Whether a page holds numbers of the activations' own type."""
        return self.scale_words == 0


@dataclass(frozen=True)
class Packed(WeightFormat):
    """A format whose codes are widened in registers; `group` columns of a row share a scale."""

    group: int = 0

    @property
    def scale_places(self) -> torch.Tensor:
        """Where the words of a row lie among those beside a page: int64 [16 rows, words of a row]."""
        return torch.arange(self.scale_words).view(-1, PAGE_ROWS).T

    def quantise(self, rows: torch.Tensor) -> Codes:
        """The codes nearest to fp32 rows [n, K], K whole pages, their scales chosen for the least squared error."""
        raise NotImplementedError

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Codes [n, K] as words: int32 [n, K / columns * 256], each a word's consecutive columns."""
        raise NotImplementedError

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        raise NotImplementedError

    def encode_scales(self, codes: Codes) -> torch.Tensor:
        """What lies beside the pages for each row, int32 [n, pages, scale_words / 16]."""
        raise NotImplementedError

    def decode_scales(self, values: torch.Tensor, words: torch.Tensor) -> Codes:
        """The inverse of `encode_scales`, for codes [n, K] and words [n, pages, scale_words / 16]."""
        raise NotImplementedError

    def widen(self, codes: Codes) -> torch.Tensor:
        """The numbers that codes stand for, fp32 [n, K]."""
        raise NotImplementedError

    def rows(self, pages: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers of row blocks, fp32 [blocks, 16, K], from whole pages [blocks, pages, bytes] and what lies beside them,
        fp32 [blocks, pages, scale_words]."""
        blocks, count = pages.shape[:2]
        words = page_rows(pages).reshape(blocks * PAGE_ROWS, count * ROW_WORDS)
        beside = scales.contiguous().view(torch.int32)[:, :, self.scale_places]  # [blocks, pages, 16 rows, words of a row]
        values = self.decode(words)
        codes = self.decode_scales(values, beside.transpose(1, 2).reshape(blocks * PAGE_ROWS, count, -1))
        return self.widen(codes).view(blocks, PAGE_ROWS, -1)


def page_pieces(pages: torch.Tensor) -> torch.Tensor:
    """Pages [blocks, pages, bytes of any type] as a view [blocks, 2, 8, pages * 32, 4] of int64 pieces of two words: half
    block, row, chunk along K, lane."""
    blocks, count = pages.shape[:2]
    return pages.view(torch.int64).view(blocks, count * 32, 8, 4, 2).permute(0, 4, 2, 1, 3)


def page_rows(pages: torch.Tensor) -> torch.Tensor:
    """The words of every row, in the order of their columns: int32 [blocks, 16, pages * 256]."""
    pieces = page_pieces(pages)
    return pieces.reshape(len(pages), PAGE_ROWS, -1).view(torch.int32)
