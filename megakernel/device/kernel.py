"""The megakernel: one persistent block per SM, a consumer, a loader and a prefetcher, many tokens a launch."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from megakernel.device.columns.places import over
from megakernel.device.consumer import consumer
from megakernel.device.context import FAULT, STOP, Bucket, Memory, Ring, make_shared_word, set_shared_word
from megakernel.device.formats.plain import TILE
from megakernel.device.loader import loader
from megakernel.device.matvec import LINES, PAGE_COLUMNS
from megakernel.device.prefetcher import prefetcher
from megakernel.device.values import declare_missing
from megakernel.geometry import Bucket as BucketNumbers

LOADER_WARPS = gl.constexpr(1)  # and of the prefetcher
LOADER_REGISTERS = gl.constexpr(200)  # they need few, but with less than about 150 ptxas 12.9 spills what both roles share
RUNTIME_ARGUMENTS = ["position", "epoch", "tokens", "patience", *BucketNumbers._fields]


@gluon.jit
def clear_halves(S: gl.constexpr, pages):
    """Zeros in the second half of every page, which may be read before anything was copied there."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    for slot in range(S.ring):
        pages.index(slot).slice(LINES // 2, LINES // 2).store(gl.zeros([LINES // 2, TILE], gl.bfloat16, LAYOUT))
    fence_async_shared()


@gluon.jit
def make_ring(S: gl.constexpr, tape):
    """Allocate the shared memory and set up its barriers."""
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    pages = gl.allocate_shared_memory(gl.bfloat16, [S.ring, LINES, TILE], tape.layout)
    if S.experts.down_halved:
        clear_halves(S, pages)
    full = gl.allocate_shared_memory(gl.int64, [S.ring, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [S.ring, 1], barriers)
    begun = gl.allocate_shared_memory(gl.int64, [1], barriers)
    taken = gl.allocate_shared_memory(gl.int64, [1], barriers)
    last = make_shared_word()
    staging = gl.allocate_shared_memory(
        gl.bfloat16, [S.staging_pages + S.beside_pages, PAGE_COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    reached = make_shared_word()
    doing = make_shared_word()
    loading = make_shared_word()
    set_shared_word(reached, 0)
    set_shared_word(doing, 0)
    set_shared_word(loading, 0)
    for slot in gl.static_range(S.ring):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(begun, count=1)
    mbarrier.init(taken, count=1)
    return Ring(pages, full, empty, begun, taken, last, staging, reached, doing, loading)


@gluon.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def megakernel(
    tape,
    halves,
    cache,
    beside,
    head_beside,
    weights,
    cache_rows,
    activations,
    constants,
    rope,
    hidden_state,
    words,
    starts,
    uses,
    counters,
    tokens_buffer,
    control,
    stamps,
    position,
    epoch,
    tokens,
    patience,
    slices,
    head_pages,
    partial_stride,
    partial_second,
    end_counter,
    records,
    S: gl.constexpr,
):
    """Decode up to `tokens` tokens from `position`; `epoch` is how many this program has decoded before.  With several columns,
    up to so many steps, from where each sequence stands; `position` then only tells in reports which step it was.

    tape and cache are TMA descriptors over [128-byte lines, 64] bf16 of `weights` and `cache_rows`, a page at a time; halves is
    one over `weights`, half a page at a time, if S.experts.down_halved; beside and head_beside over what lies beside quantised
    pages, [pages, words] fp32 of `constants`: of the body, and of a head in another format; the other arrays are those of
    `scheduler.program.Program` and `megakernel.device.context.Memory`, the numbers from `slices` on those of a
    `megakernel.geometry.Bucket`.
    """
    declare_missing()
    memory = Memory(
        weights,
        cache_rows,
        activations,
        constants,
        rope,
        hidden_state,
        words,
        counters,
        tokens_buffer,
        control,
        gl.to_tensor(patience).to(gl.int64),
        stamps,
        Bucket(slices, head_pages, partial_stride, partial_second, end_counter, records),
    )
    sm = gl.program_id(0)
    start, stop = gl.load(starts + sm), gl.load(starts + sm + 1)
    uses_per_token = gl.load(uses + sm)
    ring = make_ring(S, tape)
    # Before the first token nobody writes these two: all blocks read the same, and the loader need not be asked.
    if S.columns == 1:
        idle = (gl.load(control + STOP) <= position) | (gl.load(control + FAULT) != 0)
    else:
        idle = over(S, memory, position) | (gl.load(control + FAULT) != 0)
    tokens = gl.where(idle, 0, tokens)
    pages = (tape, halves)
    gl.warp_specialize(
        [
            (consumer, (S, memory, ring, start, stop, uses_per_token, position, epoch, tokens)),
            (
                loader,
                (S, memory, pages, beside, head_beside, cache, ring, start, stop, uses_per_token, position, epoch, tokens),
            ),
            (prefetcher, (S, memory, ring, start, stop, uses_per_token)),
        ],
        [LOADER_WARPS, LOADER_WARPS],
        [LOADER_REGISTERS, LOADER_REGISTERS],
    )
