"""Attention of few queries over a long past: the keys of each head in parts, which as many SMs share.

An SM's two consumers take two heads of one group, so that both weigh the same keys, and a part of the blocks that their queries
see.  What each part finds is left as it is: results, their sums, and the base to which they are relative
(`megakernel.device.prefill.softmax`); a second kernel adds the parts in their order (flash-decoding, Dao et al. 2023).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from megakernel.device.compat import aggregate, copy_page
from megakernel.device.prefill.attention import (
    CONSUMER_REGISTERS,
    LOADER_REGISTERS,
    Part,
    attend_blocks,
    blocks_seen,
    keys_of,
    load_blocks,
)
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import read_chunk
from megakernel.device.prefill.ring import make_ring, release, wait_free, wait_landed
from megakernel.device.prefill.softmax import LEAST, QUERIES, sums_of_none, too_large
from megakernel.device.prefill.verdict import make_verdict, say, wait_for_verdict


@aggregate
class Item:
    """A part of the past: of two heads from `head` on, for the chunk's tokens from `first` on, blocks `least` to `end`."""

    head: gl.tensor
    first: gl.tensor
    least: gl.tensor
    end: gl.tensor


@gluon.jit
def items(A: gl.constexpr, chunk):
    """How many there are."""
    return gl.cdiv(chunk.count, QUERIES) * (A.heads // 2 * A.parts)


@gluon.jit
def item_at(A: gl.constexpr, chunk, number):
    """The item of a number: all parts of two heads follow one another."""
    two = number // A.parts
    first = two // (A.heads // 2) * QUERIES
    seen = blocks_seen(A, chunk, first + QUERIES - 1)
    each = gl.cdiv(seen, A.parts)
    least = gl.minimum(number % A.parts * each, seen)
    return Item(two % (A.heads // 2) * 2, first, least, gl.minimum(least + each, seen))


@gluon.jit
def load(A: gl.constexpr, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, verdict):
    """The loader: all that the consumers' items need, and all of it again if one of them must do them once more."""
    none = gl.to_tensor(0)
    use, taken = load_items(A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, none, none)
    if wait_for_verdict(A.consumers, verdict):
        load_items(A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, use, taken)


@gluon.jit
def load_items(A: gl.constexpr, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, use, taken):
    """Queries of both heads, then keys and values from the last block to the first; returns the uses of both rings after it."""
    for number in range(gl.program_id(0), items(A, chunk), gl.num_programs(0)):
        item = item_at(A, chunk, number)
        if item.least < item.end:
            place = wait_free(2, turns, taken, A.consumers * QUERIES * A.width * 2)
            for who in gl.static_range(A.consumers):
                at = [item.first, (item.head + who) * A.width]
                copy_page(queries, at, turns.full.index(place), staged.index(place * A.consumers + who))
            taken += 1
            use = load_blocks(A, cache, layer, item.head, head_pages, item.least, item.end, blocks, ring, use)
    return use, taken


@gluon.jit
def leave(A: gl.constexpr, parts, sums, number, acc, total, base, WHO: gl.constexpr):
    """A part's results [64, width], and of each query the sum and the base."""
    place = (number * A.consumers + WHO) * QUERIES
    rows = gl.arange(0, QUERIES, gl.SliceLayout(1, acc.type.layout))[:, None]
    dims = gl.arange(0, A.width, gl.SliceLayout(0, acc.type.layout))[None, :]
    gl.store(parts + (place + rows) * A.width + dims, acc)
    sum_of = gl.sum(total, axis=1)
    gl.store(sums + 2 * (place + gl.arange(0, QUERIES, sum_of.type.layout)), sum_of)
    gl.store(sums + 2 * (place + gl.arange(0, QUERIES, base.type.layout)) + 1, base)


@gluon.jit
def attend_items(
    A: gl.constexpr, chunk, parts, sums, staged, turns, blocks, ring, use, taken, WHO: gl.constexpr, RAISING: gl.constexpr
):
    """Consumer `WHO`'s head of every item of this SM, from uses `use` and `taken` of the rings on; returns those after it, and
    whether sums grew too large."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A.keys, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A.width, 16])
    nothing = gl.zeros([QUERIES, A.keys], gl.float32, SCORES)
    largest = sums_of_none(A, nothing)
    for number in range(gl.program_id(0), items(A, chunk), gl.num_programs(0)):
        item = item_at(A, chunk, number)
        if item.least < item.end:
            part = Part(item.head + WHO, item.first, item.end, item.least)
            queries = staged.index(taken % 2 * A.consumers + WHO)
            wait_landed(2, turns, taken)
            slot = wait_landed(A.slots, ring, use)
            scores = warpgroup_mma(queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False)
            release(A.slots, ring, use)
            p, acc, total, base, use = attend_blocks(
                A, chunk, part, item.least, scores, queries, blocks, ring, use, RESULT, RAISING
            )
            largest = gl.maximum(largest, total)
            slot = wait_landed(A.slots, ring, use + 1)
            acc = warpgroup_mma(p, keys_of(A, blocks, slot), acc)
            release(A.slots, ring, use + 1)
            release(2, turns, taken)
            use += 2
            taken += 1
            leave(A, parts, sums, number, acc, total, base, WHO)
        else:
            none = sums_of_none(A, nothing)
            base = gl.full([QUERIES], LEAST, gl.float32, gl.SliceLayout(1, SCORES))
            leave(A, parts, sums, number, gl.zeros([QUERIES, A.width], gl.float32, RESULT), none, base, WHO)
    return use, taken, too_large(largest)


@gluon.jit
def attend(A: gl.constexpr, chunk, parts, sums, staged, turns, blocks, ring, verdict, WHO: gl.constexpr):
    """Consumer `WHO`: its items, and all of them again if the sums of any consumer grew too large."""
    none = gl.to_tensor(0)
    use, taken, failed = attend_items(A, chunk, parts, sums, staged, turns, blocks, ring, none, none, WHO, False)
    say(verdict, WHO, failed)
    if wait_for_verdict(A.consumers, verdict):
        attend_items(A, chunk, parts, sums, staged, turns, blocks, ring, use, taken, WHO, True)


@gluon.jit(do_not_specialize=["layer", "head_pages"])
def read_past(queries, cache, chunk, parts, sums, layer, head_pages, A: gl.constexpr):
    """Attention of a chunk of few tokens, all heads, by parts of the past.

    parts fp32 [item, consumer, 64, width]; sums fp32 [item, consumer, 64, 2]: of each query the sum, and its base.
    """
    let_next_start()
    chunk = read_chunk(chunk)
    staged = gl.allocate_shared_memory(gl.bfloat16, [2 * A.consumers, QUERIES, A.width], queries.layout)
    blocks = gl.allocate_shared_memory(gl.bfloat16, [A.slots, A.tiles, A.pages, A.page_positions, 64], cache.layout)
    turns, ring = make_ring(2, A.consumers), make_ring(A.slots, A.consumers)
    verdict = make_verdict(A.consumers)
    wait_for_previous()
    gl.warp_specialize(
        [
            (attend, (A, chunk, parts, sums, staged, turns, blocks, ring, verdict, 0)),
            (attend, (A, chunk, parts, sums, staged, turns, blocks, ring, verdict, 1)),
            (load, (A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, verdict)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def add_parts(chunk, parts, sums, out, A: gl.constexpr):
    """What `read_past` left, added in the order of the keys: out bf16 [chunk, heads * head rows]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [gl.num_warps(), 1], [1, 0])
    let_next_start()
    chunk = read_chunk(chunk)
    part = gl.arange(0, A.parts, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, A.width, gl.SliceLayout(0, LAYOUT))
    wait_for_previous()
    for number in range(gl.program_id(0), chunk.count * A.heads, gl.num_programs(0)):
        row, head = number // A.heads, number % A.heads
        first = (row // QUERIES * (A.heads // 2) + head // 2) * A.parts
        place = ((first + part) * A.consumers + head % 2) * QUERIES + row % QUERIES
        base = gl.load(sums + 2 * place + 1)
        share = gl.exp2(base - gl.max(base, axis=0))
        total = gl.sum(share * gl.load(sums + 2 * place), axis=0)
        found = gl.load(parts + place[:, None] * A.width + dims[None, :])
        result = gl.sum(found * share[:, None], axis=0) / total
        gl.store(out + (row * A.heads + head) * A.head_rows + dims, result.to(gl.bfloat16), mask=dims < A.head_rows)
