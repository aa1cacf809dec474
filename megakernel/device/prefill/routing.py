"""Which experts a chunk's tokens take, and where their rows go: sorted by expert, of one expert in the order of the tokens.

`read_choice` is `instructions.choose` for many tokens, a tile of them at a time; `read_places` counts.  A token has one row in
each of its k slots' experts.  Row numbers are sums of whole numbers alone, and nobody adds to what another adds to: the same
scores give the same places.  `megakernel.prefill.reference` says the same in PyTorch.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.choose import ordered
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import BLOCK, read_chunk
from megakernel.prefill.tiling import ROUTED
from models.config import MOST_EXPERTS

TILE = gl.constexpr(ROUTED)  # tokens
SIZE = gl.constexpr(MOST_EXPERTS)
NONE = gl.constexpr(-(2**62))  # below the key of any score
CHOOSING = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # [tokens, experts]: a warp has whole tokens,
COUNTING = gl.constexpr(gl.BlockedLayout([ROUTED, 1], [1, 32], [1, 4], [0, 1]))  # and a thread all tokens of an expert
EXPERTS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def added(first, second):
    """What a running sum does."""
    return first + second


@gluon.jit
def keys_of(scores, expert):
    """int64, in the order of the scores, of equal ones the lower number of an expert above the higher: no two are equal."""
    return ordered(scores).to(gl.int64) * SIZE + (SIZE - 1 - expert)[None, :]


@gluon.jit
def read_choice(chunk, scores, slots, shares, counts, S: gl.constexpr):
    """From scores fp32 [chunk, experts, padded to whole blocks]: slots int32 [chunk, experts], which of its token's slots an
    expert has, -1 for none; shares fp32 [chunk, k], of the softmax; counts int32 [tiles, experts], rows of each expert."""
    COUNT: gl.constexpr = S.experts.total
    CHOSEN: gl.constexpr = S.experts.chosen
    STRIDE: gl.constexpr = (COUNT + BLOCK - 1) // BLOCK * BLOCK
    let_next_start()
    chunk = read_chunk(chunk)
    token = gl.arange(0, TILE, gl.SliceLayout(1, CHOOSING))
    expert = gl.arange(0, SIZE, gl.SliceLayout(0, CHOOSING))
    wait_for_previous()
    for tile in range(gl.program_id(0), gl.cdiv(chunk.count, TILE), gl.num_programs(0)):
        row = (tile * TILE + token)[:, None]
        known = (row < chunk.count) & (expert < COUNT)[None, :]
        found = gl.load(scores + row * STRIDE + expert[None, :], mask=known, other=float("-inf"))
        mass = gl.where(known, gl.exp(found - gl.max(found, axis=1)[:, None]), 0.0)
        keys = gl.where(known, keys_of(found, expert), NONE)
        slot = gl.full([TILE, SIZE], -1, gl.int32, CHOOSING)
        for place in range(CHOSEN):
            taken = known & (keys == gl.max(keys, axis=1)[:, None])
            slot = gl.where(taken, place, slot)
            keys = gl.where(taken, NONE, keys)
        chosen = slot >= 0
        if S.experts.renormalised:
            total = gl.sum(gl.where(chosen, mass, 0.0), axis=1)
        else:
            total = gl.sum(mass, axis=1)
        gl.store(slots + row * COUNT + expert[None, :], slot, mask=known)
        gl.store(shares + row * CHOSEN + slot, mass / total[:, None], mask=chosen)
        gl.store(counts + tile * COUNT + expert, gl.sum(chosen.to(gl.int32), axis=0), mask=expert < COUNT)


@gluon.jit
def read_places(chunk, slots, counts, places, ends, S: gl.constexpr):
    """places int32 [chunk, k], the row of each of a token's slots; ends int32 [experts], where each expert's rows end."""
    COUNT: gl.constexpr = S.experts.total
    CHOSEN: gl.constexpr = S.experts.chosen
    let_next_start()
    chunk = read_chunk(chunk)
    token = gl.arange(0, TILE, gl.SliceLayout(1, COUNTING))[:, None]
    expert = gl.arange(0, SIZE, gl.SliceLayout(0, COUNTING))[None, :]
    line = gl.arange(0, SIZE, EXPERTS)
    tiles = gl.cdiv(chunk.count, TILE)
    wait_for_previous()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = gl.zeros([SIZE], gl.int32, gl.SliceLayout(0, COUNTING))
        before = gl.zeros([SIZE], gl.int32, gl.SliceLayout(0, COUNTING))
        for first in range(0, tiles, TILE):
            other = first + token
            found = gl.load(counts + other * COUNT + expert, mask=(other < tiles) & (expert < COUNT), other=0)
            total += gl.sum(found, axis=0)
            before += gl.sum(gl.where(other < tile, found, 0), axis=0)
        rows = gl.convert_layout(total, EXPERTS)
        end = gl.associative_scan(rows, 0, added)
        if tile == 0:
            gl.store(ends + line, end, mask=line < COUNT)
        start = gl.convert_layout(end - rows, gl.SliceLayout(0, COUNTING)) + before
        row = tile * TILE + token
        known = (row < chunk.count) & (expert < COUNT)
        slot = gl.load(slots + row * COUNT + expert, mask=known, other=-1)
        chosen = (slot >= 0).to(gl.int32)
        place = start[None, :] + gl.associative_scan(chosen, 0, added) - chosen
        gl.store(places + row * CHOSEN + slot, place, mask=slot >= 0)
