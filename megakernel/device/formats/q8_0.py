"""Device side of `models.formats.q8_0`: a word becomes four bf16 with four operations.

A byte alone in the lower bits of bf16 is the code times 2^-133, mostly subnormal; one exact product and sum in bf16, which
knows subnormal numbers (PTX ISA, fma.rn.bf16x2), make it code - 128 times 2^-6.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.blocks import (
    GROUP,
    STAGED,
    TILE,
    group_activation,
    no_groups,
    pair_scales,
    pair_words,
    products_of_groups,
    scales_at,
    total_of_groups,
)
from megakernel.device.formats.layouts import ROWS
from megakernel.device.formats.packed import copy_words, four_values, operand, page_words
from models.formats.q8_0 import Q8_0

__all__ = ["STAGED"]

TILES = gl.constexpr(Q8_0.columns // TILE.value)
CODES = gl.constexpr(4)  # of a word
TILE_WORDS = gl.constexpr(TILE.value // CODES.value)
LANE = gl.constexpr(2 * CODES.value)
SCALES = gl.constexpr(Q8_0.scale_words)
FACTOR = gl.constexpr(2.0**6)  # what is widened is so much too small

# 0x7f00 is 2^127, 0xc000 is -2; the selectors of prmt take bytes 1 and 3, each with a zero above it.
WIDEN = gl.constexpr("""{
    .reg .b32 bytes, factor, zero;
    mov.b32 factor, 0x7f007f00;
    mov.b32 zero, 0xc000c000;
    and.b32 bytes, $4, 0x00ff00ff;
    fma.rn.bf16x2 $0, bytes, factor, zero;
    prmt.b32 bytes, $4, 0, 0x4341;
    fma.rn.bf16x2 $1, bytes, factor, zero;
    and.b32 bytes, $5, 0x00ff00ff;
    fma.rn.bf16x2 $2, bytes, factor, zero;
    prmt.b32 bytes, $5, 0, 0x4341;
    fma.rn.bf16x2 $3, bytes, factor, zero;
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
def stage_sums(S: gl.constexpr, ring, part, values):
    """No sums are needed."""


@gluon.jit
def activation(S: gl.constexpr, ring, page):
    """See `group_activation`."""
    return group_activation(ring, page, TILES, LANE)


@gluon.jit
def nothing():
    """Accumulators."""
    return no_groups(TILES)


@gluon.jit
def take(S: gl.constexpr, ring, slot):
    """The words, and those with the scales."""
    return page_words(ring, slot, TILES, TILE_WORDS), pair_words(S, ring, slot, TILES)


@gluon.jit
def product(taken, x, acc):
    """`acc` and the products of the page's groups, each times its scale; too small by FACTOR."""
    words, beside = taken
    return acc + products_of_groups(widen(words), x, TILES) * pair_scales(beside)


@gluon.jit
def total(acc):
    """See `total_of_groups`."""
    return total_of_groups(acc) * FACTOR


@gluon.jit
def copy_beside(S: gl.constexpr, beside, ring, number, slot):
    """The scales of the page's groups."""
    copy_words(S, beside, ring, number, slot, SCALES)


@gluon.jit
def numbers(words, beside, first):
    """Words [16 rows, words] of a page, from its column `first` on, as bf16 [16 rows, columns], rounded from what they stand
    for; `beside` points to the page's scales."""
    GROUPS: gl.constexpr = words.shape[1] * CODES // GROUP
    values = gl.reshape(values_of(words), [ROWS, GROUPS, GROUP]).to(gl.float32) * FACTOR
    values = values * scales_at(beside, values, first)
    return gl.reshape(values.to(gl.bfloat16), [ROWS, GROUPS * GROUP])
