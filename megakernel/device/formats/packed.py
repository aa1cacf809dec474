"""What formats share whose weights are widened in registers: pages as words, and what lies beside them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import copy_page, reinterpret
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, WORDS, block_layout, fragments, staged
from megakernel.geometry import ITEM_BYTES, STAGING_BYTES

UNIT = gl.constexpr(STAGING_BYTES)
ITEM = gl.constexpr(ITEM_BYTES)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def page_activation(ring, page, TILES: gl.constexpr, COLUMNS: gl.constexpr, TOGETHER: gl.constexpr):
    """Page `page` of the staged vector, the same bf16 values in all columns: [tiles, columns of a tile, 8]; a lane holds
    TOGETHER columns side by side."""
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), TOGETHER)
    PAGES: gl.constexpr = ring.staging.shape[0] * (UNIT // ITEM) // (TILES * COLUMNS)
    tiles = reinterpret(ring.staging, gl.bfloat16, [PAGES, TILES, COLUMNS], staged(TOGETHER, [TILES, COLUMNS])).index(page)
    x = gl.expand_dims(tiles.load(gl.SliceLayout(2, B)), 2)
    x, _ = gl.broadcast(x, gl.zeros([TILES, COLUMNS, MMA_COLUMNS], gl.bfloat16, B))
    return x


@gluon.jit
def page_words(ring, slot, TILES: gl.constexpr, COUNT: gl.constexpr):
    """The page in a slot, int32 [tiles, 16 rows, words]."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), WORDS)
    return reinterpret(ring.pages.index(slot), gl.int32, [TILES, ROWS, COUNT], fragments(TILES, COUNT)).load(A)


@gluon.jit
def beside_of(S: gl.constexpr, ring, slot, TYPE: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory for COUNT words beside the page in a slot, behind the staged vector: [1, COUNT]."""
    EACH: gl.constexpr = S.beside_bytes // (COUNT * 4)
    FIRST: gl.constexpr = S.staging_pages * UNIT // (COUNT * 4)
    TOTAL: gl.constexpr = (S.staging_pages + S.beside_pages) * UNIT // (COUNT * 4)
    return reinterpret(ring.staging, TYPE, [TOTAL, 1, COUNT], LAYOUT).index(FIRST + slot * EACH)


@gluon.jit
def copy_words(S: gl.constexpr, beside, ring, number, slot, COUNT: gl.constexpr):
    """Ask for the COUNT words beside page `number` of a descriptor's pages, to land with the page in a slot."""
    LAYOUT: gl.constexpr = beside.layout
    copy_page(beside, [number, 0], ring.full.index(slot), beside_of(S, ring, slot, gl.float32, COUNT, LAYOUT))
