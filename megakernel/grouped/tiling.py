"""How a grouped product is cut into tiles: numbers alone, no GPU.

The kernel finds the same tiles by itself, in `megakernel.device.grouped.walk`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from instructions.dimensions import ceil_div, next_power_of_two

LINE = 128  # bytes of a row that one step along K takes
CONSUMER_ROWS = 64  # of W: what one warpgroup multiplies
CONSUMERS = 2
TILE_ROWS = CONSUMERS * CONSUMER_ROWS  # of W
SLOTS = 4  # steps along K ahead: as many as fit shared memory
ALIGNMENT = 16  # elements of which N and K are multiples: stores of 16 bytes, and TMA's strides
MOST_GROUPS = 1024
BAND = 8  # tiles of tokens

# Tokens that a tile may be compiled for: two operands, of which the second may be none.  A tile takes the first that holds it.
WIDTHS = ((16, 0), (32, 0), (64, 0), (128, 0), (128, 64), (256, 0), (256, 16), (256, 32))
MAIN, TAIL = 256, 32  # tokens of a slot, and those beyond them
# How a group may be cut, widest first: tokens of every tile but the last, and how many more the last may have.
CUTS = ((MAIN, TAIL), (128, 64), (64, 0))


@dataclass(frozen=True)
class Tiling:
    """What the kernel is compiled for: places for the offsets of so many groups; `step` columns of K at a time, 64 of bf16 or
    128 of e4m3, and `slots` steps ahead; whether rows have scales.

    `paged`: W lies on the weight tape, bf16, as blocks of 16 rows.  `units`: 8 rows of W are gates and the next 8 their ups,
    and what is kept are units, SwiGLU of both, times a number for each row of x.
    """

    groups: int
    slots: int
    step: int
    scaled: bool
    paged: bool = False
    units: bool = False


@dataclass(frozen=True)
class Plan:
    """How a product is launched: on `sms` SMs, up to `band` tiles of a group's tokens at a time with the same weights."""

    sms: int
    band: int = BAND
    slots: int = SLOTS

    def tiling(self, groups: int, itemsize: int = 2) -> Tiling:
        """What is compiled for so many groups, one kernel for up to 128, and elements of so many bytes: those of one byte are
        scaled."""
        return Tiling(max(128, next_power_of_two(groups)), self.slots, LINE // itemsize, itemsize == 1)


@dataclass(frozen=True)
class Tile:
    """Rows [first, first + count) of x, all of `group`, times rows [column * TILE_ROWS, …) of its matrix."""

    group: int
    first: int
    count: int
    column: int


def width(count: int) -> tuple[int, int]:
    """The operands of a tile of `count` tokens."""
    return next(found for found in WIDTHS if count <= sum(found))


def token_tiles(count: int, cut: tuple[int, int]) -> int:
    """Tiles of a group of `count` rows."""
    main, tail = cut
    return max(1, ceil_div(count - tail, main)) if count > 0 else 0


def sizes(offsets: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """First row and number of rows of every group, as the kernel understands offsets that do not rise or leave x."""
    stops = [min(max(stop, 0), rows) for stop in offsets]
    return [(start, max(0, stop - start)) for start, stop in zip([0, *stops], stops, strict=False)]


def choose_cut(counts: Sequence[int], columns: int, sms: int) -> tuple[int, int]:
    """The widest cut that gives every SM a tile; the narrowest if none does."""
    return next((cut for cut in CUTS if columns * sum(token_tiles(count, cut) for count in counts) >= sms), CUTS[-1])


def tiles(offsets: Sequence[int], rows: int, n: int, sms: int, band: int) -> Iterator[Tile]:
    """All tiles in the kernel's order; SM i takes tiles i, i + sms, … ."""
    groups, columns = sizes(offsets, rows), ceil_div(n, TILE_ROWS)
    cut = choose_cut([count for _, count in groups], columns, sms)
    for group, (start, count) in enumerate(groups):
        whole = token_tiles(count, cut)
        for first in range(0, whole, band):
            height = min(band, whole - first)
            span = ceil_div(columns, max(1, (columns * height + sms // 2) // sms))
            for left in range(0, columns, span):
                for tile, column in product(range(first, first + height), range(left, min(left + span, columns))):
                    last = count - tile * cut[0] if tile == whole - 1 else cut[0]
                    yield Tile(group, start + tile * cut[0], last, column)


def padded_rows(counts: Sequence[int], cut: tuple[int, int]) -> int:
    """Rows that are multiplied for groups of so many: what exceeds their sum is waste."""
    main, _ = cut
    whole = [(count, token_tiles(count, cut)) for count in counts if count > 0]
    return sum((number - 1) * main + sum(width(count - (number - 1) * main)) for count, number in whole)
