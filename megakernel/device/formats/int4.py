"""Device side of `models.formats.int4`: a word becomes eight bf16, 16 + code each, with seven operations.

A group's sum of those times the activation is 16 + zero times the activation's own sum too large; that sum is a product with
ones, on the tensor cores, where it comes out beside the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.formats.layouts import FLAT_TILES, MMA_COLUMNS, ROWS, WORDS, block_layout
from megakernel.device.formats.packed import beside_of, copy_words, page_activation, page_words
from models.formats.int4 import INT4

TILES = gl.constexpr(INT4.columns // INT4.group)
CODES = gl.constexpr(8)  # of a word
TILE = gl.constexpr(INT4.group)  # columns of a tile
TILE_WORDS = gl.constexpr(INT4.group // 8)
SCALES = gl.constexpr(INT4.scale_words)
ZERO = gl.constexpr(0xF)  # the zero point's bits of a word beside the page
ZERO_SHIFT = gl.constexpr(19)  # from there to the upper bits of fp32's mantissa
SIXTEEN = gl.constexpr(0x41800000)  # of fp32

WIDEN = gl.constexpr("""{
    .reg .b32 pair, turned;
    lop3.b32 pair, $8, 0x00780078, 0x41804180, 0xea;
    mov.b32 {$0, $1}, pair;
    shr.u32 turned, $8, 4;
    lop3.b32 pair, turned, 0x00780078, 0x41804180, 0xea;
    mov.b32 {$2, $3}, pair;
    shr.u32 turned, $8, 8;
    lop3.b32 pair, turned, 0x00780078, 0x41804180, 0xea;
    mov.b32 {$4, $5}, pair;
    shf.r.wrap.b32 turned, $8, $8, 12;
    lop3.b32 pair, turned, 0x00780078, 0x41804180, 0xea;
    mov.b32 {$6, $7}, pair;
}""")


@gluon.jit
def values_of(words):
    """Words [..., words] as bf16 [..., words, 2, 2, 2], their columns in order, 16 + code."""
    k0, k1, k2, k3, k4, k5, k6, k7 = gl.inline_asm_elementwise(
        WIDEN,
        "=h,=h,=h,=h,=h,=h,=h,=h,r",
        [words],
        dtype=(
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
        ),
        is_pure=True,
        pack=1,
    )
    even = gl.join(gl.join(k0, k4), gl.join(k2, k6))
    odd = gl.join(gl.join(k1, k5), gl.join(k3, k7))
    return gl.join(even, odd)


@gluon.jit
def widen(words):
    """Words [tiles, 16 rows, words] as bf16 [tiles, 16 rows, columns], 16 + code."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), WORDS * CODES)
    return gl.convert_layout(gl.reshape(values_of(words), [TILES, ROWS, TILE]), A, assert_trivial=True)


@gluon.jit
def scale_and_zero(beside):
    """What lies beside a page, int32, as scales and as 16 + zero point, fp32."""
    zero = (((beside & ZERO) << ZERO_SHIFT) | SIXTEEN).to(gl.float32, bitcast=True)
    return (beside & ~ZERO).to(gl.float32, bitcast=True), zero


@gluon.jit
def activation(ring, page):
    """See `page_activation`."""
    return page_activation(ring, page, TILES, TILE, WORDS * CODES)


@gluon.jit
def take(S: gl.constexpr, ring, slot):
    """The words, and those with the scales and zero points of the groups, int32 [tiles, 16, 1]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, block_layout())
    words = page_words(ring, slot, TILES, TILE_WORDS)
    beside = beside_of(S, ring, slot, gl.int32, SCALES, FLAT_TILES)
    return words, gl.expand_dims(beside.reshape([TILES, ROWS]).load(LAYOUT), 2)


@gluon.jit
def product(taken, x, acc):
    """`acc` and the page's product: of each group (16 + codes) x - (16 + zero) sum x, times its scale."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), WORDS * CODES)
    words, beside = taken
    nothing = gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout())
    part = mma_v2(widen(words), x, nothing)
    total = mma_v2(gl.full([TILES, ROWS, TILE], 1.0, gl.bfloat16, A), x, nothing)
    scale, zero = scale_and_zero(beside)
    return acc + (part - zero * total) * scale


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
