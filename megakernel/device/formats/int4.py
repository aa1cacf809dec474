"""Device side of `models.formats.int4`: words become bf16, 16 + code each (`megakernel.device.formats.nibbles`).

A group's sum of those times the activation is 16 + zero times the activation's own sum too large; that sum is staged with the
activation.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.formats.layouts import FLAT_TILES, MMA_COLUMNS, ROWS, accumulators, block_layout
from megakernel.device.formats.nibbles import CODES, LANE, operand_of, values_of
from megakernel.device.formats.packed import beside_of, copy_words, page_activation, page_words, stage_sums_of, sums_of
from megakernel.device.numbers import power_of_two
from models.formats.int4 import INT4

TILES = gl.constexpr(INT4.columns // INT4.group)
TILE = gl.constexpr(INT4.group)  # columns of a tile
TILE_WORDS = gl.constexpr(INT4.group // CODES.value)
STAGED = LANE
SCALES = gl.constexpr(INT4.scale_words)
ZERO = gl.constexpr(0xF)  # the zero point's bits of a word beside the page
ZERO_SHIFT = gl.constexpr(19)  # from there to the upper bits of fp32's mantissa
SIXTEEN = gl.constexpr(0x41800000)  # of fp32


@gluon.jit
def scale_and_zero(beside):
    """What lies beside a page, int32, as scales and as 16 + zero point, fp32."""
    zero = (((beside & ZERO) << ZERO_SHIFT) | SIXTEEN).to(gl.float32, bitcast=True)
    return (beside & ~ZERO).to(gl.float32, bitcast=True), zero


@gluon.jit
def stage_sums(S: gl.constexpr, ring, part, values):
    """The sums of the groups of part `part` of the vector, bf16 [columns]."""
    stage_sums_of(S, ring, part, values, TILE)


@gluon.jit
def activation(S: gl.constexpr, ring, page):
    """See `page_activation`; and the sums of the tiles, fp32 [tiles, 1, 1]."""
    sums, first = sums_of(S, ring, TILES)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, block_layout()))
    tiles = gl.expand_dims(gl.expand_dims(sums.index(first + page).load(LAYOUT), 1), 2)
    return page_activation(ring, page, TILES, TILE, LANE), tiles


@gluon.jit
def stage_columns(S: gl.constexpr, ring, page, values):
    """The sums of the groups of whole pages from page `page` on, of bf16 [staged columns, columns of the pages]."""
    STAGED_COLUMNS: gl.constexpr = values.shape[0]
    PAGES: gl.constexpr = values.shape[1] // (TILES * TILE)
    sums, first = sums_of(S, ring, PAGES * STAGED_COLUMNS * TILES)
    groups = gl.sum(gl.reshape(values.to(gl.float32), [STAGED_COLUMNS, PAGES * TILES, TILE]), axis=2)
    groups = gl.permute(gl.reshape(groups, [STAGED_COLUMNS, PAGES, TILES]), [1, 0, 2])
    sums.index(first + page // PAGES).reshape([PAGES, STAGED_COLUMNS, TILES]).store(groups)


@gluon.jit
def with_staged(S: gl.constexpr, ring, page, x):
    """The operand, and the sums of its tiles, fp32 [tiles, 16 rows, 8 columns]."""
    STAGED_COLUMNS: gl.constexpr = power_of_two(S.columns)
    FULL: gl.constexpr = accumulators(TILES, STAGED_COLUMNS)
    sums, first = sums_of(S, ring, STAGED_COLUMNS * TILES)
    tiles = sums.index(first + page).reshape([STAGED_COLUMNS, TILES]).permute([1, 0])
    tiles = gl.expand_dims(gl.expand_dims(tiles.load(gl.SliceLayout(1, gl.SliceLayout(2, FULL))), 1), 2)
    SHAPE: gl.constexpr = [TILES, ROWS, MMA_COLUMNS // STAGED_COLUMNS, STAGED_COLUMNS]
    tiles, _ = gl.broadcast(tiles, gl.zeros(SHAPE, gl.float32, FULL))
    return x, gl.convert_layout(gl.reshape(tiles, [TILES, ROWS, MMA_COLUMNS]), block_layout(), assert_trivial=True)


@gluon.jit
def with_words(x):
    """The operand, and the sums of its tiles, fp32 [tiles, 1, 8 columns]: added in the order in which a warp adds a staged
    vector, four values side by side and then by halves, the farthest first."""
    sums = gl.sum(gl.reshape(x.to(gl.float32), [TILES, 2, 2, 2, 2, 2, 4, MMA_COLUMNS]), axis=6)
    for _ in gl.static_range(5):
        sums = gl.sum(sums, axis=1)
    return x, gl.expand_dims(gl.convert_layout(sums, gl.SliceLayout(1, block_layout())), 1)


@gluon.jit
def nothing():
    """Accumulators."""
    return gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout())


@gluon.jit
def take(S: gl.constexpr, ring, slot):
    """The words, and those with the scales and zero points of the groups, int32 [tiles, 16, 1]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, block_layout())
    words = page_words(ring, slot, TILES, TILE_WORDS)
    beside = beside_of(S, ring, slot, gl.int32, [1, SCALES], FLAT_TILES)
    return words, gl.expand_dims(beside.reshape([TILES, ROWS]).load(LAYOUT), 2)


@gluon.jit
def product(taken, x, acc):
    """`acc` and the page's product: of each group (16 + codes) x - (16 + zero) sum x, times its scale."""
    words, beside = taken
    values, sums = x
    part = mma_v2(operand_of(words, TILES, TILE), values, gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout()))
    scale, zero = scale_and_zero(beside)
    return acc + (part - zero * sums) * scale


@gluon.jit
def total(acc):
    """The sums of the tiles."""
    return acc


@gluon.jit
def copy_beside(S: gl.constexpr, beside, ring, number, slot):
    """The scales and zero points of the page's groups."""
    copy_words(S, beside, ring, number, slot, SCALES)


@gluon.jit
def numbers(words, beside, first):
    """Words [16 rows, words] of a page, from its column `first` on, as bf16 [16 rows, columns], rounded from what they stand
    for; `beside` points to the page's scales and zero points."""
    GROUPS: gl.constexpr = words.shape[1] // TILE_WORDS
    words = gl.reshape(words, [ROWS, GROUPS, TILE_WORDS])
    values = gl.reshape(values_of(words), [ROWS, GROUPS, TILE]).to(gl.float32)
    OF_GROUPS: gl.constexpr = gl.SliceLayout(2, values.type.layout)
    group = first // TILE + gl.arange(0, GROUPS, gl.SliceLayout(0, OF_GROUPS))[None, :]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OF_GROUPS))[:, None]
    scale, zero = scale_and_zero(gl.load(beside + group * ROWS + row).to(gl.int32, bitcast=True))
    values = (values - zero[:, :, None]) * scale[:, :, None]
    return gl.reshape(values.to(gl.bfloat16), [ROWS, GROUPS * TILE])
