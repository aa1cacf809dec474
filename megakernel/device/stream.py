"""Many row blocks of few pages, one after the other: what the warps make of a row block is summed while the next is multiplied.

The warps meet once a row block.  Beside a row block of a quantised matrix, that is a page or two of work, meeting more often
takes as long as the work.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.compat import barrier
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, block_layout, handed_layout
from megakernel.device.trace import COMPUTED, LANDED, stamp

MOST_PAGES = gl.constexpr(4)  # of a row block: all of them are held until the warps meet
HELD_COLUMNS = gl.constexpr(2048)  # of an activation that stays in registers, 64 of each thread
FLAT_SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.constexpr_function
def streams(matrix):
    """Whether a matrix's row blocks are multiplied in a stream."""
    return matrix.format.value.LANE.value > 2 and matrix.pages.value <= MOST_PAGES.value


@gluon.constexpr_function
def result_layout(matrix, warps):
    """Layout of a row block's result, [16, 8]."""
    return gl.SliceLayout(0, handed_layout(warps) if streams(matrix) else block_layout())


@gluon.jit
def held_activation(S: gl.constexpr, ring, matrix: gl.constexpr):
    """The staged activation, page by page, where it stays in registers."""
    F: gl.constexpr = matrix.format
    held = ()
    if matrix.pages * F.COLUMNS <= HELD_COLUMNS:
        for page in gl.static_range(matrix.pages):
            held += (F.activation(S, ring, page),)
    return held


@gluon.jit
def warp_sums(S: gl.constexpr, ring, step, use, matrix: gl.constexpr, held):
    """Each warp's part of a row block's products, fp32 [warps, 16 rows, 8 equal columns]; keeps the pages."""
    F: gl.constexpr = matrix.format
    PAGES: gl.constexpr = matrix.pages
    WARPS: gl.constexpr = gl.num_warps()
    acc = F.nothing()
    for page in gl.static_range(PAGES):
        slot = (use + page) % S.ring
        if PAGES * F.COLUMNS <= HELD_COLUMNS:
            x = held[page]
        else:
            x = F.activation(S, ring, page)
        mbarrier.wait(ring.full.index(slot), ((use + page) // S.ring) & 1)
        if S.trace:
            if use + page == step.use:
                stamp(S, step.trace, LANDED)
        acc = F.product(F.take(S, ring, slot), x, acc)
    tiles = F.total(acc)
    return gl.sum(gl.reshape(tiles, [tiles.shape[0] // WARPS, WARPS, ROWS, MMA_COLUMNS]), axis=0)


@gluon.jit
def hand_in(S: gl.constexpr, ring, use, pages: gl.constexpr, place, sums):
    """Leave the warps' parts of a row block for all to see, and release its pages; also a barrier."""
    place.store(sums)
    barrier()
    for page in gl.static_range(pages):
        mbarrier.arrive(ring.empty.index((use + page) % S.ring), count=1)


@gluon.jit
def handed_in(place):
    """The sum over the warps, fp32 [16 rows, 8 equal columns]: each thread one pair of rows half a block apart."""
    LAYOUT: gl.constexpr = handed_layout(gl.num_warps())
    return gl.sum(place.load(LAYOUT), axis=0)


@gluon.jit
def each_row_block(S: gl.constexpr, memory, ring, step, block, blocks, matrix: gl.constexpr, finish: gl.constexpr, state):
    """Multiply row blocks `block` to `block + blocks` by the staged activation, and let `finish` have what comes of each."""
    PAGES: gl.constexpr = matrix.pages
    WARPS: gl.constexpr = gl.num_warps()
    places = gl.allocate_shared_memory(gl.float32, [2, WARPS, ROWS, MMA_COLUMNS], FLAT_SUMS)
    held = held_activation(S, ring, matrix)
    for i in range(blocks):
        use = step.use + i * PAGES
        sums = warp_sums(S, ring, step, use, matrix, held)
        state = finish(S, memory, step, block + i - 1, handed_in(places.index((i + 1) % 2)), i > 0, state)
        hand_in(S, ring, use, PAGES, places.index(i % 2), sums)
    stamp(S, step.trace, COMPUTED)
    return finish(S, memory, step, block + blocks - 1, handed_in(places.index((blocks + 1) % 2)), True, state)
