"""Many row blocks of few pages, one after the other: what the warps make of a row block is summed while the next is multiplied.

The warps meet once a row block.  Beside a row block of a quantised matrix, that is a page or two of work, meeting more often
takes as long as the work.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.columns.staging import activation_of
from megakernel.device.compat import barrier
from megakernel.device.pages import give_back
from megakernel.device.sums import leave, make_places, parts_of, result_of, take
from megakernel.device.trace import COMPUTED, LANDED, stamp

MOST_PAGES = gl.constexpr(4)  # of a row block: all of them are held until the warps meet
HELD_COLUMNS = gl.constexpr(2048)  # of an activation that stays in registers, 64 of each thread


@gluon.constexpr_function
def streams(matrix):
    """Whether a matrix's row blocks are multiplied in a stream."""
    return matrix.format.value.LANE.value > 2 and matrix.pages.value <= MOST_PAGES.value


@gluon.jit
def held_activation(S: gl.constexpr, ring, matrix: gl.constexpr):
    """The staged activation, page by page, where it stays in registers."""
    F: gl.constexpr = matrix.format
    held = ()
    if matrix.pages * F.COLUMNS <= HELD_COLUMNS:
        for page in gl.static_range(matrix.pages):
            held += (activation_of(S, F, ring, page),)
    return held


@gluon.jit
def warp_sums(S: gl.constexpr, ring, step, use, matrix: gl.constexpr, held):
    """Each warp's part of a row block's products, fp32 [warps, 16 rows, 8 equal columns]; keeps the pages."""
    F: gl.constexpr = matrix.format
    PAGES: gl.constexpr = matrix.pages
    acc = F.nothing()
    for page in gl.static_range(PAGES):
        slot = (use + page) % S.ring
        if PAGES * F.COLUMNS <= HELD_COLUMNS:
            x = held[page]
        else:
            x = activation_of(S, F, ring, page)
        mbarrier.wait(ring.full.index(slot), ((use + page) // S.ring) & 1)
        if S.trace:
            if use + page == step.use:
                stamp(S, step.trace, LANDED)
        acc = F.product(F.take(S, ring, slot), x, acc)
    return parts_of(F.total(acc))


@gluon.jit
def hand_in(S: gl.constexpr, ring, use, pages: gl.constexpr, places, number, sums):
    """Leave the warps' parts of a row block for all to see, and release its pages; also a barrier."""
    leave(S, places, number, sums)
    barrier()
    for page in gl.static_range(pages):
        give_back(ring, (use + page) % S.ring)


@gluon.jit
def handed_in(S: gl.constexpr, places, number):
    """The sum over the warps, one after the other, fp32 [16 rows, 8 equal columns] in `result_layout`."""
    return result_of(S, gl.sum(take(S, places, number), axis=0))


@gluon.jit
def each_row_block(S: gl.constexpr, memory, ring, step, block, blocks, matrix: gl.constexpr, finish: gl.constexpr, state):
    """Multiply row blocks `block` to `block + blocks` by the staged activation, and let `finish` have what comes of each."""
    PAGES: gl.constexpr = matrix.pages
    places = make_places(S, 2)
    held = held_activation(S, ring, matrix)
    for i in range(blocks):
        use = step.use + i * PAGES
        before = handed_in(S, places, (i + 1) % 2)
        sums = warp_sums(S, ring, step, use, matrix, held)
        state = finish(S, memory, step, block + i - 1, before, i > 0, state)
        hand_in(S, ring, use, PAGES, places, i % 2, sums)
    stamp(S, step.trace, COMPUTED)
    return finish(S, memory, step, block + blocks - 1, handed_in(S, places, (blocks + 1) % 2), True, state)
