"""Device side of `models.formats.fp8`: a word becomes four bf16 with five operations, a lane's words in the order of the matrix
instruction's A operand."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.formats.layouts import FLAT_TILES, MMA_COLUMNS, ROWS, block_layout
from megakernel.device.formats.packed import beside_of, copy_words, four_values, operand, page_activation, page_words
from megakernel.device.formats.sumless import stage_columns as stage_columns
from megakernel.device.formats.sumless import stage_sums as stage_sums
from megakernel.device.formats.sumless import with_staged as with_staged
from megakernel.device.formats.sumless import with_words as with_words
from models.formats.fp8 import FP8

TILES = gl.constexpr(8)
CODES = gl.constexpr(4)  # of a word
TILE_WORDS = gl.constexpr(FP8.columns // 8 // 4)
TILE = gl.constexpr(FP8.columns // 8)  # columns of a tile
LANE = gl.constexpr(2 * CODES.value)
STAGED = LANE
SCALES = gl.constexpr(FP8.scale_words)
FACTOR = gl.constexpr(2.0**120)  # e4m3's bits in bf16's places are so much too small

WIDEN = gl.constexpr("""{
    .reg .b32 rest;
    and.b32 $0, $4, 0x87f087f0;
    shl.b32 $1, $4, 4;
    shr.u32 rest, $4, 4;
    and.b32 rest, rest, 0x07000700;
    lop3.b32 $1, $1, 0x80f080f0, rest, 0xea;
    and.b32 $2, $5, 0x87f087f0;
    shl.b32 $3, $5, 4;
    shr.u32 rest, $5, 4;
    and.b32 rest, rest, 0x07000700;
    lop3.b32 $3, $3, 0x80f080f0, rest, 0xea;
}""")


@gluon.jit
def values_of(words):
    """Words as bf16, columns in order, too small by FACTOR."""
    return four_values(words, WIDEN)


@gluon.jit
def widen(words):
    """Words [tiles, 16 rows, words] as bf16 [tiles, 16 rows, columns], too small by FACTOR."""
    return operand(values_of(words), TILES, TILE, LANE)


@gluon.jit
def activation(S: gl.constexpr, ring, page):
    """See `page_activation`."""
    return page_activation(ring, page, TILES, TILE, LANE)


@gluon.jit
def nothing():
    """Accumulators, and the rows' scales, which every page brings."""
    sums = gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout())
    return sums, gl.expand_dims(gl.zeros([1, ROWS], gl.float32, gl.SliceLayout(2, block_layout())), 2)


@gluon.jit
def take(S: gl.constexpr, ring, slot):
    """The words, and the rows' scales, fp32 [1, 16, 1]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, block_layout())
    words = page_words(ring, slot, TILES, TILE_WORDS)
    scales = beside_of(S, ring, slot, gl.float32, [1, SCALES], FLAT_TILES).load(LAYOUT)
    return words, gl.expand_dims(scales, 2)


@gluon.jit
def product(taken, x, acc):
    """`acc` and the page's product, too small by FACTOR and the scales."""
    words, scales = taken
    sums, _ = acc
    return mma_v2(widen(words), x, sums), scales


@gluon.jit
def total(acc):
    """The sums of the tiles."""
    sums, scales = acc
    return sums * FACTOR * scales


@gluon.jit
def copy_beside(S: gl.constexpr, beside, ring, number, slot):
    """The scales of the page's rows."""
    copy_words(S, beside, ring, number, slot, SCALES)


@gluon.jit
def numbers(words, beside, first):
    """Words [16 rows, words] of a page, from its column `first` on, as bf16 [16 rows, columns], rounded from what they stand
    for; `beside` points to the page's scales."""
    scales = gl.load(beside + gl.arange(0, ROWS, gl.SliceLayout(1, words.type.layout)))
    values = gl.reshape(values_of(words), [ROWS, words.shape[1] * CODES]).to(gl.float32) * FACTOR
    scales = gl.convert_layout(scales, gl.SliceLayout(1, values.type.layout), assert_trivial=True)
    return (values * scales[:, None]).to(gl.bfloat16)
