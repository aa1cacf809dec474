"""Device side of `models.formats.int4`: a word becomes eight bf16, 16 + code each, with seven operations.

A group's sum of those times the activation is 16 + zero times the activation's own sum too large; that sum is staged with the
activation.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.compat import reinterpret
from megakernel.device.formats.layouts import FLAT_TILES, MMA_COLUMNS, ROWS, block_layout
from megakernel.device.formats.packed import UNIT, beside_of, copy_words, page_activation, page_words
from models.formats.int4 import INT4

TILES = gl.constexpr(INT4.columns // INT4.group)
CODES = gl.constexpr(8)  # of a word
TILE = gl.constexpr(INT4.group)  # columns of a tile
TILE_WORDS = gl.constexpr(INT4.group // 8)
LANE = gl.constexpr(2 * CODES.value)
SCALES = gl.constexpr(INT4.scale_words)
ZERO = gl.constexpr(0xF)  # the zero point's bits of a word beside the page
ZERO_SHIFT = gl.constexpr(19)  # from there to the upper bits of fp32's mantissa
SIXTEEN = gl.constexpr(0x41800000)  # of fp32

WIDEN = gl.constexpr("""{
    .reg .b32 turned;
    lop3.b32 $0, $8, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $8, 4;
    lop3.b32 $1, turned, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $8, 8;
    lop3.b32 $2, turned, 0x00780078, 0x41804180, 0xea;
    shf.r.wrap.b32 turned, $8, $8, 12;
    lop3.b32 $3, turned, 0x00780078, 0x41804180, 0xea;
    lop3.b32 $4, $9, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $9, 4;
    lop3.b32 $5, turned, 0x00780078, 0x41804180, 0xea;
    shr.u32 turned, $9, 8;
    lop3.b32 $6, turned, 0x00780078, 0x41804180, 0xea;
    shf.r.wrap.b32 turned, $9, $9, 12;
    lop3.b32 $7, turned, 0x00780078, 0x41804180, 0xea;
}""")


@gluon.jit
def values_of(words):
    """Words as bf16, their columns in order, 16 + code; two words at a time, into registers of two columns."""
    r0, r1, r2, r3, r4, r5, r6, r7 = gl.inline_asm_elementwise(
        WIDEN,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    even = gl.join(gl.join(r0, r4), gl.join(r2, r6))
    odd = gl.join(gl.join(r1, r5), gl.join(r3, r7))
    registers = gl.reshape(gl.join(even, odd), [words.numel // 2, 2, 2, 2, 2])
    return gl.permute(registers, [0, 2, 3, 4, 1])


@gluon.jit
def widen(words):
    """Words [tiles, 16 rows, words] as bf16 [tiles, 16 rows, columns], 16 + code."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), LANE)
    return gl.convert_layout(gl.reshape(values_of(words), [TILES, ROWS, TILE]), A, assert_trivial=True)


@gluon.jit
def scale_and_zero(beside):
    """What lies beside a page, int32, as scales and as 16 + zero point, fp32."""
    zero = (((beside & ZERO) << ZERO_SHIFT) | SIXTEEN).to(gl.float32, bitcast=True)
    return (beside & ~ZERO).to(gl.float32, bitcast=True), zero


@gluon.jit
def sums_of(S: gl.constexpr, ring, COUNT: gl.constexpr):
    """Where the sums of the groups lie, behind the staged vector: fp32 [1024 / COUNT / 4, COUNT]."""
    EACH: gl.constexpr = UNIT // 4 // COUNT
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return reinterpret(ring.staging, gl.float32, [S.staging_pages * EACH, COUNT], LAYOUT), (
        S.staging_pages - S.sums_pages
    ) * EACH


@gluon.jit
def stage_sums(S: gl.constexpr, ring, part, values):
    """The sums of the groups of part `part` of the vector, bf16 [columns]."""
    COUNT: gl.constexpr = values.shape[0] // TILE
    sums, first = sums_of(S, ring, COUNT)
    groups = gl.reshape(values.to(gl.float32), [COUNT, TILE])
    sums.index(first + part).store(gl.sum(groups, axis=1))


@gluon.jit
def activation(S: gl.constexpr, ring, page):
    """See `page_activation`; and the sums of the tiles, fp32 [tiles, 1, 1]."""
    sums, first = sums_of(S, ring, TILES)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, block_layout()))
    tiles = gl.expand_dims(gl.expand_dims(sums.index(first + page).load(LAYOUT), 1), 2)
    return page_activation(ring, page, TILES, TILE, LANE), tiles


@gluon.jit
def nothing():
    """Accumulators."""
    return gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout())


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
    words, beside = taken
    values, sums = x
    part = mma_v2(widen(words), values, gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout()))
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
