"""Device side of `models.formats.q4_0`: words become bf16, 16 + code each (`megakernel.device.formats.nibbles`).

A group's sum of those times the activation is 24 times the activation's own sum too large; that sum is staged with the
activation.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.blocks import (
    GROUP,
    STAGED,
    TILE,
    group_activation,
    group_sums,
    no_groups,
    pair_scales,
    pair_words,
    products_of_groups,
    scales_at,
    total_of_groups,
)
from megakernel.device.formats.layouts import ROWS
from megakernel.device.formats.nibbles import CODES, LANE, OFFSET, operand_of, values_of
from megakernel.device.formats.packed import copy_words, page_words, stage_sums_of
from models.formats.q4_0 import Q4_0
from models.formats.q4_0 import ZERO as CODE_OF_ZERO

__all__ = ["STAGED"]

TILES = gl.constexpr(Q4_0.columns // TILE.value)
TILE_WORDS = gl.constexpr(TILE.value // CODES.value)
SCALES = gl.constexpr(Q4_0.scale_words)
ZERO = gl.constexpr(OFFSET.value + CODE_OF_ZERO)  # what 0 is widened to


@gluon.jit
def stage_sums(S: gl.constexpr, ring, part, values):
    """The sums of the groups of part `part` of the vector, bf16 [columns]."""
    stage_sums_of(S, ring, part, values, GROUP)


@gluon.jit
def activation(S: gl.constexpr, ring, page):
    """See `group_activation`; and the sums of the groups."""
    return group_activation(ring, page, TILES, LANE), group_sums(S, ring, page, TILES)


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
    """`acc` and the page's product: of each group (16 + codes) x - 24 sum x, times its scale."""
    words, beside = taken
    values, sums = x
    parts = products_of_groups(operand_of(words, TILES, TILE), values, TILES)
    return acc + (parts - sums * ZERO) * pair_scales(beside)


@gluon.jit
def total(acc):
    """See `total_of_groups`."""
    return total_of_groups(acc)


@gluon.jit
def copy_beside(S: gl.constexpr, beside, ring, number, slot):
    """The scales of the page's groups."""
    copy_words(S, beside, ring, number, slot, SCALES)


@gluon.jit
def numbers(words, beside, first):
    """Words [16 rows, words] of a page, from its column `first` on, as bf16 [16 rows, columns], rounded from what they stand
    for; `beside` points to the page's scales."""
    GROUPS: gl.constexpr = words.shape[1] * CODES // GROUP
    values = gl.reshape(values_of(words), [ROWS, GROUPS, GROUP]).to(gl.float32) - ZERO
    values = values * scales_at(beside, values, first)
    return gl.reshape(values.to(gl.bfloat16), [ROWS, GROUPS * GROUP])
