"""Causal attention of a chunk of tokens over the cache: earlier turns, earlier chunks and the chunk itself.

Keys and values come from the cache's own pages by TMA: a box of whole pages lands as [keys, head], 128-byte swizzled, as
wgmma wants it.  Each consumer, a warpgroup, has 64 queries of one head; softmax runs block by block from the diagonal to the
first key, with the scores of the next block under way while this block's values are weighted (as FlashAttention 3 does, Shah
et al. 2024), and the consumers' turns interleave by themselves.  Weights are relative to a base that the first block gives; an
SM whose sums so grow too large does its tiles once more, with bases that are raised (`megakernel.device.prefill.softmax`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from megakernel.device.compat import aggregate, copy_page, reinterpret
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import read_chunk
from megakernel.device.prefill.ring import make_ring, release, wait_free, wait_landed
from megakernel.device.prefill.softmax import (
    LEAST,
    QUERIES,
    bases,
    finish_weights,
    masked,
    raised,
    sums_of_none,
    too_large,
    weigh,
)
from megakernel.device.prefill.verdict import make_verdict, say, wait_for_verdict
from megakernel.options import TMA_LAYOUT

OPERAND = gl.constexpr(TMA_LAYOUT)
CONSUMER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(40)


@aggregate
class Share:
    """Tiles of queries: `rows` of them a head, the heaviest first; this SM takes every other one of a pair of rounds."""

    rows: gl.tensor
    tiles: gl.tensor
    rounds: gl.tensor


@aggregate
class Tile:
    """Queries of one head: the chunk's token `first` and on, and the blocks of keys that the last of them sees."""

    head: gl.tensor
    first: gl.tensor
    blocks: gl.tensor


@aggregate
class Part:
    """One consumer's queries of a tile: the chunk's token `first` and on, the blocks that the last of them sees, and how many
    blocks come before them that only later queries of the tile see."""

    head: gl.tensor
    first: gl.tensor
    seen: gl.tensor
    later: gl.tensor


@gluon.jit
def share_of(A: gl.constexpr, chunk):
    """This SM's share."""
    rows = gl.cdiv(chunk.count, A.consumers * QUERIES)
    tiles = rows * A.heads
    return Share(rows, tiles, gl.cdiv(tiles, gl.num_programs(0)))


@gluon.jit
def tile_number(turn):
    """The tile of this SM in a round: forth and back, so that heavy and light tiles are shared evenly."""
    sm = gl.program_id(0)
    return turn * gl.num_programs(0) + gl.where(turn % 2 == 0, sm, gl.num_programs(0) - 1 - sm)


@gluon.jit
def blocks_seen(A: gl.constexpr, chunk, last):
    """Blocks of keys up to the chunk's token `last`, or the last there is."""
    return gl.cdiv(chunk.start + gl.minimum(last, chunk.count - 1) + 1, A.keys)


@gluon.jit
def tile_at(A: gl.constexpr, share, chunk, number):
    """The tile of a number: all heads of the last queries first."""
    first = (share.rows - 1 - number // A.heads) * (A.consumers * QUERIES)
    return Tile(number % A.heads, first, blocks_seen(A, chunk, first + A.consumers * QUERIES - 1))


@gluon.jit
def load(A: gl.constexpr, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, verdict):
    """The loader: all that the consumers' tiles need, and all of it again if one of them must do them once more."""
    none = gl.to_tensor(0)
    use, taken = load_heads(A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, none, none)
    if wait_for_verdict(A.consumers, verdict):
        load_heads(A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, use, taken)


@gluon.jit
def load_heads(A: gl.constexpr, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, use, taken):
    """Queries, then keys and values from the last block to the first; returns the uses of both rings after it."""
    share = share_of(A, chunk)
    for turn in range(share.rounds):
        number = tile_number(turn)
        if number < share.tiles:
            tile = tile_at(A, share, chunk, number)
            place = wait_free(2, turns, taken, A.consumers * QUERIES * A.width * 2)
            for who in gl.static_range(A.consumers):
                at = [tile.first + who * QUERIES, tile.head * A.width]
                copy_page(queries, at, turns.full.index(place), staged.index(place * A.consumers + who))
            taken += 1
            use = load_blocks(A, cache, layer, tile.head, head_pages, 0, tile.blocks, blocks, ring, use)
    return use, taken


@gluon.jit
def load_blocks(A: gl.constexpr, cache, layer, head, head_pages, least, end, blocks, ring, use):
    """Keys and values of a query head, from block `end`, not included, to block `least`; returns the ring's use after them."""
    page = (layer * A.kv_heads + head // A.group) * 2 * head_pages
    for i in range(end - least):
        first = page + (end - 1 - i) * A.pages
        for value in gl.static_range(2):
            slot = wait_free(A.slots, ring, use, A.keys * A.width * 2)
            copy_page(cache, [0, first + value * head_pages, 0, 0], ring.full.index(slot), blocks.index(slot))
            use += 1
    return use


@gluon.jit
def keys_of(A: gl.constexpr, blocks, slot):
    """A block of keys or values [keys, width] in shared memory."""
    return reinterpret(blocks.index(slot), gl.bfloat16, [A.keys, A.width], OPERAND)


@gluon.jit
def part_at(A: gl.constexpr, share, chunk, turn, WHO: gl.constexpr):
    """Consumer `WHO`'s part of this SM's tile of a turn; of a part past the chunk's end, which nobody stores, one block."""
    tile = tile_at(A, share, chunk, tile_number(turn))
    first = tile.first + WHO * QUERIES
    seen = gl.where(first < chunk.count, blocks_seen(A, chunk, first + QUERIES - 1), 1)
    return Part(tile.head, first, seen, tile.blocks - seen)


@gluon.jit
def attend_blocks(
    A: gl.constexpr, chunk, part, least, scores, queries, blocks, ring, use, RESULT: gl.constexpr, RAISING: gl.constexpr
):
    """All of a part's blocks down to `least` but the last product, whose scores with the first block are there: the last
    block's weights, the results and sums before it, the bases, and the ring's use of that block."""
    TOKENS: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    clear = (chunk.start + part.first) // A.keys  # blocks that come before every query
    positions = chunk.start + part.first + gl.arange(0, QUERIES, TOKENS)
    nothing = gl.zeros_like(scores)
    scores = masked(A, scores, positions, part.seen - 1)
    base = bases(A, scores)
    weights, total = weigh(A, scores, base)
    p = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
    acc = gl.zeros([QUERIES, A.width], gl.float32, RESULT)
    for i in range(1, part.seen - least):
        slot = wait_landed(A.slots, ring, use + 2)
        flying = warpgroup_mma(queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False, is_async=True)
        slot = wait_landed(A.slots, ring, use + 1)
        adding = warpgroup_mma(p, keys_of(A, blocks, slot), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[flying])
        release(A.slots, ring, use + 2)
        block = part.seen - 1 - i
        if block >= clear:
            scores = masked(A, scores, positions, block)
            base = gl.where(base == LEAST, bases(A, scores), base)
        weights, sums = weigh(A, scores, base)
        if RAISING:
            base, shrink = raised(A, scores, base, total + sums)
            weights, sums = weigh(A, scores, base)
            total *= gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
        total += sums
        finish_weights(total)
        acc, p = warpgroup_mma_wait(0, deps=[adding, p])
        release(A.slots, ring, use + 1)
        if RAISING:
            acc *= gl.convert_layout(shrink, gl.SliceLayout(1, RESULT))[:, None]
        p = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
        use += 2
    return p, acc, total, base, use


@gluon.jit
def store_part(A: gl.constexpr, chunk, part, acc, total, out):
    """64 queries' results, divided by their sums."""
    acc *= gl.convert_layout(1.0 / gl.sum(total, axis=1), gl.SliceLayout(1, acc.type.layout))[:, None]
    rows = part.first + gl.arange(0, QUERIES, gl.SliceLayout(1, acc.type.layout))[:, None]
    dims = gl.arange(0, A.width, gl.SliceLayout(0, acc.type.layout))[None, :]
    place = out + rows * (A.heads * A.head_rows) + part.head * A.head_rows + dims
    gl.store(place, acc.to(gl.bfloat16), mask=(rows < chunk.count) & (dims < A.head_rows))


@gluon.jit
def attend_heads(
    A: gl.constexpr, chunk, out, staged, turns, blocks, ring, use, taken, WHO: gl.constexpr, RAISING: gl.constexpr
):
    """Consumer `WHO`'s part of every tile of this SM, from uses `use` and `taken` of the rings on; returns those after it, and
    whether sums grew too large.

    The next tile's first product is under way while this one's last is finished and stored, unless blocks come before it that
    only later queries see.  Where it is not, what flies reads whatever is there, and nobody reads what comes of it.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A.keys, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A.width, 16])
    share = share_of(A, chunk)
    count = share.rounds - gl.where(tile_number(share.rounds - 1) < share.tiles, 0, 1)
    nothing = gl.zeros([QUERIES, A.keys], gl.float32, SCORES)
    scores = nothing
    largest = sums_of_none(A, nothing)
    under_way = False
    for turn in range(count):
        part = part_at(A, share, chunk, turn, WHO)
        queries = staged.index(taken % 2 * A.consumers + WHO)
        if not under_way:
            for _ in range(2 * part.later):
                wait_landed(A.slots, ring, use)
                release(A.slots, ring, use)
                use += 1
            wait_landed(2, turns, taken)
            slot = wait_landed(A.slots, ring, use)
            scores = warpgroup_mma(queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False)
            release(A.slots, ring, use)
        p, acc, total, _, use = attend_blocks(A, chunk, part, 0, scores, queries, blocks, ring, use, RESULT, RAISING)
        largest = gl.maximum(largest, total)
        under_way = (turn + 1 < count) & (part_at(A, share, chunk, turn + 1, WHO).later == 0)
        slot = wait_landed(A.slots, ring, use + 1)
        adding = warpgroup_mma(p, keys_of(A, blocks, slot), acc, is_async=True)
        wait_landed(2, turns, taken + 1, under_way)
        slot = wait_landed(A.slots, ring, use + 2, under_way)
        next_queries = staged.index((taken + 1) % 2 * A.consumers + WHO)
        flying = warpgroup_mma(next_queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False, is_async=True)
        acc, p = warpgroup_mma_wait(1, deps=[adding, p])
        release(A.slots, ring, use + 1)
        release(2, turns, taken)
        use += 2
        taken += 1
        store_part(A, chunk, part, acc, total, out)
        scores = warpgroup_mma_wait(0, deps=[flying])
        release(A.slots, ring, use, under_way)
    return use, taken, too_large(largest)


@gluon.jit
def attend(A: gl.constexpr, chunk, out, staged, turns, blocks, ring, verdict, WHO: gl.constexpr):
    """Consumer `WHO`: its tiles, and all of them again if the sums of any consumer grew too large."""
    none = gl.to_tensor(0)
    use, taken, failed = attend_heads(A, chunk, out, staged, turns, blocks, ring, none, none, WHO, False)
    say(verdict, WHO, failed)
    if wait_for_verdict(A.consumers, verdict):
        attend_heads(A, chunk, out, staged, turns, blocks, ring, use, taken, WHO, True)


@gluon.jit(do_not_specialize=["layer", "head_pages"])
def read_attention(queries, cache, chunk, out, layer, head_pages, A: gl.constexpr):
    """Attention of a chunk of tokens, all heads: out bf16 [chunk, heads * head rows]."""
    let_next_start()
    chunk = read_chunk(chunk)
    staged = gl.allocate_shared_memory(gl.bfloat16, [2 * A.consumers, QUERIES, A.width], queries.layout)
    blocks = gl.allocate_shared_memory(gl.bfloat16, [A.slots, A.tiles, A.pages, A.page_positions, 64], cache.layout)
    turns, ring = make_ring(2, A.consumers), make_ring(A.slots, A.consumers)
    verdict = make_verdict(A.consumers)
    wait_for_previous()
    gl.warp_specialize(
        [
            (attend, (A, chunk, out, staged, turns, blocks, ring, verdict, 0)),
            (attend, (A, chunk, out, staged, turns, blocks, ring, verdict, 1)),
            (load, (A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring, verdict)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )
