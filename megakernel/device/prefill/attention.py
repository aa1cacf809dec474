"""Causal attention of a chunk of tokens over the cache: earlier turns, earlier chunks and the chunk itself.

Keys and values come from the cache's own pages by TMA: a box of whole pages lands as [keys, head], 128-byte swizzled, as
wgmma wants it.  Each consumer, a warpgroup, has 64 queries of one head; softmax runs block by block (online, Milakov and
Gimelshein 2018) from the diagonal to the first key, with the scores of the next block under way while this block's values are
weighted (as FlashAttention 3 does, Shah et al. 2024), and the consumers' turns interleave by themselves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from megakernel.device.compat import aggregate, copy_page, reinterpret
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import read_chunk
from megakernel.device.prefill.ring import make_ring, release, wait_free, wait_landed
from megakernel.options import TMA_LAYOUT

QUERIES = gl.constexpr(64)  # of one consumer
LOG2_E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(-1.0e37)  # below every score but those of keys that are not seen, and finite times the scale
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
def load_heads(A: gl.constexpr, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring):
    """The loader: queries, then keys and values from the last block to the first."""
    share = share_of(A, chunk)
    BYTES: gl.constexpr = A.keys * A.width * 2
    use = 0
    taken = 0
    for turn in range(share.rounds):
        number = tile_number(turn)
        if number < share.tiles:
            tile = tile_at(A, share, chunk, number)
            place = wait_free(2, turns, taken, A.consumers * QUERIES * A.width * 2)
            for who in gl.static_range(A.consumers):
                at = [tile.first + who * QUERIES, tile.head * A.width]
                copy_page(queries, at, turns.full.index(place), staged.index(place * A.consumers + who))
            taken += 1
            page = (layer * A.kv_heads + tile.head // A.group) * 2 * head_pages
            for i in range(tile.blocks):
                first = page + (tile.blocks - 1 - i) * A.pages
                for value in gl.static_range(2):
                    slot = wait_free(A.slots, ring, use, BYTES)
                    copy_page(cache, [0, first + value * head_pages, 0, 0], ring.full.index(slot), blocks.index(slot))
                    use += 1


@gluon.jit
def masked(A: gl.constexpr, scores, positions, block):
    """Scores [64, keys] of a block, -inf for keys after the query's own position.

    Keys are compared by eights, whose numbers are constants in the machine code.
    """
    eights = gl.reshape(scores, [QUERIES, A.keys // 8, 8])
    LAYOUT: gl.constexpr = eights.type.layout
    own = gl.convert_layout(positions, gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT))) - block * A.keys
    last = own[:, None] - gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :]
    firsts = 8 * gl.arange(0, A.keys // 8, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    seen = gl.expand_dims(firsts[None, :], 2) <= gl.expand_dims(last, 1)
    seen_scores = gl.where(seen, eights, float("-inf"))
    return gl.convert_layout(gl.reshape(seen_scores, [QUERIES, A.keys]), scores.type.layout)


@gluon.jit
def weigh(A: gl.constexpr, scores, most, total):
    """One step of online softmax: the block's weights [64, keys], the new maximum and sums, and what earlier results shrink by.

    A query that has seen no key yet has the maximum LEAST, and weighs all with 0.  A query's sum is kept in 8 parts, of every
    eighth key, so that no threads need to exchange them before the end.
    """
    FACTOR: gl.constexpr = A.scale * LOG2_E
    peak = gl.maximum(most, gl.max(scores, axis=1))
    base = peak * FACTOR
    weights = gl.exp2(scores * FACTOR - base[:, None])
    shrink = gl.exp2(most * FACTOR - base)
    sums = gl.sum(gl.reshape(weights, [QUERIES, A.keys // 8, 8]), axis=1)
    return weights, peak, total * gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))[:, None] + sums, shrink


@gluon.jit
def no_sums(A: gl.constexpr, scores):
    """The sums [64, 8] before the first block."""
    return gl.sum(gl.reshape(gl.zeros_like(scores), [QUERIES, A.keys // 8, 8]), axis=1)


@gluon.jit
def finish_weights(total):
    """Have all weights that are summed in `total` computed here.

    The assembler moves a wait for the matrix instruction ahead of all arithmetic that does not need its result, and so would
    have the values' product finished before the weights are begun.  It moves none ahead of an event that depends on them; no
    sum is negative, and the event never happens.  Wide heads gain by it, whose product takes longer than the weights; of
    narrow ones the two consumers overlap by themselves, better without.
    """
    gl.inline_asm_elementwise(
        """
        {
        .reg .b32 signs;
        .reg .pred negative;
        or.b32 signs, $4, $5;
        or.b32 signs, signs, $6;
        or.b32 signs, signs, $7;
        setp.lt.s32 negative, signs, 0;
        @negative pmevent 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r",
        [total],
        gl.int32,
        is_pure=False,
        pack=4,
    )


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
def attend_blocks(A: gl.constexpr, chunk, part, scores, queries, blocks, ring, use, RESULT: gl.constexpr):
    """All of a part but the last product, whose scores with the first block are there: the last block's weights, the results
    and sums before it, and the ring's use of that block."""
    TOKENS: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    clear = (chunk.start + part.first + 1) // A.keys  # blocks of which every query sees all
    positions = chunk.start + part.first + gl.arange(0, QUERIES, TOKENS)
    nothing = gl.zeros_like(scores)
    scores = masked(A, scores, positions, part.seen - 1)
    most = gl.full([QUERIES], LEAST, gl.float32, TOKENS)
    weights, most, total, shrink = weigh(A, scores, most, no_sums(A, scores))
    p = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
    acc = gl.zeros([QUERIES, A.width], gl.float32, RESULT)
    for i in range(1, part.seen):
        slot = wait_landed(A.slots, ring, use + 2)
        flying = warpgroup_mma(queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False, is_async=True)
        slot = wait_landed(A.slots, ring, use + 1)
        adding = warpgroup_mma(p, keys_of(A, blocks, slot), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[flying])
        release(A.slots, ring, use + 2)
        block = part.seen - 1 - i
        if block >= clear:
            scores = masked(A, scores, positions, block)
        weights, most, total, shrink = weigh(A, scores, most, total)
        if A.width > 64:
            finish_weights(total)
        acc, p = warpgroup_mma_wait(0, deps=[adding, p])
        release(A.slots, ring, use + 1)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, RESULT))[:, None]
        p = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
        use += 2
    return p, acc, total, use


@gluon.jit
def store_part(A: gl.constexpr, chunk, part, acc, total, out):
    """64 queries' results, divided by their sums."""
    acc *= gl.convert_layout(1.0 / gl.sum(total, axis=1), gl.SliceLayout(1, acc.type.layout))[:, None]
    rows = part.first + gl.arange(0, QUERIES, gl.SliceLayout(1, acc.type.layout))[:, None]
    dims = gl.arange(0, A.width, gl.SliceLayout(0, acc.type.layout))[None, :]
    place = out + rows * (A.heads * A.head_rows) + part.head * A.head_rows + dims
    gl.store(place, acc.to(gl.bfloat16), mask=(rows < chunk.count) & (dims < A.head_rows))


@gluon.jit
def attend_heads(A: gl.constexpr, chunk, out, staged, turns, blocks, ring, WHO: gl.constexpr):
    """Consumer `WHO`: its part of every tile of this SM.

    The next tile's first product is under way while this one's last is finished and stored, unless blocks come before it that
    only later queries see.  Where it is not, what flies reads whatever is there, and nobody reads what comes of it.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A.keys, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A.width, 16])
    share = share_of(A, chunk)
    count = share.rounds - gl.where(tile_number(share.rounds - 1) < share.tiles, 0, 1)
    nothing = gl.zeros([QUERIES, A.keys], gl.float32, SCORES)
    scores = nothing
    under_way = False
    use = 0
    for turn in range(count):
        part = part_at(A, share, chunk, turn, WHO)
        queries = staged.index(turn % 2 * A.consumers + WHO)
        if not under_way:
            for _ in range(2 * part.later):
                wait_landed(A.slots, ring, use)
                release(A.slots, ring, use)
                use += 1
            wait_landed(2, turns, turn)
            slot = wait_landed(A.slots, ring, use)
            scores = warpgroup_mma(queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False)
            release(A.slots, ring, use)
        p, acc, total, use = attend_blocks(A, chunk, part, scores, queries, blocks, ring, use, RESULT)
        under_way = (turn + 1 < count) & (part_at(A, share, chunk, turn + 1, WHO).later == 0)
        slot = wait_landed(A.slots, ring, use + 1)
        adding = warpgroup_mma(p, keys_of(A, blocks, slot), acc, is_async=True)
        wait_landed(2, turns, turn + 1, under_way)
        slot = wait_landed(A.slots, ring, use + 2, under_way)
        next_queries = staged.index((turn + 1) % 2 * A.consumers + WHO)
        flying = warpgroup_mma(next_queries, keys_of(A, blocks, slot).permute([1, 0]), nothing, use_acc=False, is_async=True)
        acc, p = warpgroup_mma_wait(1, deps=[adding, p])
        release(A.slots, ring, use + 1)
        release(2, turns, turn)
        use += 2
        store_part(A, chunk, part, acc, total, out)
        scores = warpgroup_mma_wait(0, deps=[flying])
        release(A.slots, ring, use, under_way)


@gluon.jit(do_not_specialize=["layer", "head_pages"])
def read_attention(queries, cache, chunk, out, layer, head_pages, A: gl.constexpr):
    """Attention of a chunk of tokens, all heads: out bf16 [chunk, heads * head rows]."""
    let_next_start()
    chunk = read_chunk(chunk)
    staged = gl.allocate_shared_memory(gl.bfloat16, [2 * A.consumers, QUERIES, A.width], queries.layout)
    blocks = gl.allocate_shared_memory(gl.bfloat16, [A.slots, A.tiles, A.pages, A.page_positions, 64], cache.layout)
    turns, ring = make_ring(2, A.consumers), make_ring(A.slots, A.consumers)
    wait_for_previous()
    gl.warp_specialize(
        [
            (attend_heads, (A, chunk, out, staged, turns, blocks, ring, 0)),
            (attend_heads, (A, chunk, out, staged, turns, blocks, ring, 1)),
            (load_heads, (A, queries, cache, chunk, layer, head_pages, staged, turns, blocks, ring)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )
