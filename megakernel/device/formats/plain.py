"""Device side of `models.formats.plain`: pages of bf16, which ldmatrix reads as [8 tiles, 16 rows, 64 columns]."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.compat import reinterpret
from megakernel.device.formats.layouts import FLAT_TILES, MMA_COLUMNS, ROWS, block_layout
from megakernel.device.formats.sumless import stage_columns as stage_columns
from megakernel.device.formats.sumless import stage_sums as stage_sums
from megakernel.device.formats.sumless import with_staged as with_staged
from megakernel.device.formats.sumless import with_words as with_words
from megakernel.geometry import ITEM_BYTES
from models.tape import TILE_BYTES, TILES_PER_PAGE

TILES = gl.constexpr(TILES_PER_PAGE)
TILE = gl.constexpr(TILE_BYTES // ITEM_BYTES)  # columns of a tile
LANE = gl.constexpr(2)
STAGED = LANE
PAGE_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))  # as TMA writes it with 128-byte swizzle


@gluon.jit
def activation(S: gl.constexpr, ring, page):
    """The same bf16 values in all columns, [tiles, columns of a tile, 8]."""
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), 2)
    tiles = reinterpret(ring.staging.index(page), gl.bfloat16, [TILES, TILE], FLAT_TILES)
    x = gl.expand_dims(tiles.load(gl.SliceLayout(2, B)), 2)
    x, _ = gl.broadcast(x, gl.zeros([TILES, TILE, MMA_COLUMNS], gl.bfloat16, B))
    return x


@gluon.jit
def nothing():
    """Accumulators."""
    return gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout())


@gluon.jit
def take(S: gl.constexpr, ring, slot):
    """The weights, bf16 [tiles, 16 rows, columns of a tile]."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), 2)
    return reinterpret(ring.pages.index(slot), gl.bfloat16, [TILES, ROWS, TILE], PAGE_LAYOUT).load(A)


@gluon.jit
def product(taken, x, acc):
    """`acc` and the page's product."""
    return mma_v2(taken, x, acc)


@gluon.jit
def total(acc):
    """The sums of the tiles."""
    return acc


@gluon.jit
def copy_beside(S: gl.constexpr, beside, ring, number, slot):
    """Nothing lies beside the page."""
