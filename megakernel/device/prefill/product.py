"""Products of a chunk of tokens with a matrix of the weight tape: y[tokens, rows] = x[tokens, columns] W[rows, columns]^T.

One persistent kernel: a loader streams tiles of both operands by TMA, one or two consumers of four warps multiply them with
wgmma, 64 tokens each, and finish their tile as the matrix asks (`megakernel.device.prefill.projections`).  A weight tile is a
box of 16-row blocks of the tape by one 128-byte tile, which lands as the rows that wgmma's B operand wants, 128-byte swizzled.

Where there are fewer tiles than SMs, each is split along K.  The parts are left in global memory and added by whichever part
is done last, in the order of K: no part waits for another, and the sum is the same in every run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from megakernel.device.compat import aggregate, barrier, copy_page, reinterpret
from megakernel.device.prefill.ring import Ring, make_ring, release, wait_free, wait_landed
from megakernel.options import TMA_LAYOUT

K = gl.constexpr(64)  # columns of one step: 128 bytes of bf16
BLOCK = gl.constexpr(16)  # rows of a block of the tape
ROWS = gl.constexpr(64)  # tokens of one consumer
OPERAND = gl.constexpr(TMA_LAYOUT)
GROUP = gl.constexpr(16)  # token tiles that are multiplied with the same weights one after another, while those are in L2


@aggregate
class Chunk:
    """The tokens that are read now: the position of the first, and how many."""

    start: gl.tensor
    count: gl.tensor


@aggregate
class Operands:
    """Slots of shared memory for tokens [64 a consumer, 64] and for weights [1, blocks, 16, 64], and their ring."""

    x: gl.shared_memory_descriptor
    w: gl.shared_memory_descriptor
    ring: Ring


@aggregate
class Work:
    """One kernel's share of a model: which matrix, in how many tiles of rows and steps along K, and where parts are added."""

    layer: gl.tensor
    place: gl.tensor  # of the layer's matrix among those of the weights' descriptor
    tiles: gl.tensor  # int32: the tiles of the matrix's rows that are wanted,
    columns: gl.tensor  # and how many
    steps: gl.tensor  # along K, which
    split: gl.tensor  # so many parts share
    parts: gl.tensor  # fp32 partial sums [item, consumer, 64, tile]
    arrivals: gl.tensor  # int32, one a tile and consumer: parts that are there


@aggregate
class Item:
    """One tile or a part of it: its place, and its steps along K."""

    tile: gl.tensor
    row: gl.tensor  # tile of tokens
    column: gl.tensor  # tile of the matrix's rows
    part: gl.tensor
    first: gl.tensor
    last: gl.tensor


@gluon.jit
def make_operands(T: gl.constexpr, x, w):
    """Shared memory for the boxes of two descriptors."""
    return Operands(
        gl.allocate_shared_memory(gl.bfloat16, [T.slots, T.tokens, K], x.layout),
        gl.allocate_shared_memory(gl.bfloat16, [T.slots, 1, T.tile // BLOCK, BLOCK, K], w.layout),
        make_ring(T.slots, T.consumers),
    )


@gluon.constexpr_function
def accumulators(tile):
    """[64, tile] of a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tile, 16])


@gluon.jit
def read_chunk(chunk):
    """The chunk that the host has written: start, count."""
    return Chunk(gl.load(chunk), gl.load(chunk + 1))


@gluon.jit
def item_count(T: gl.constexpr, work, chunk):
    """How many items all SMs share."""
    return gl.cdiv(chunk.count, T.tokens) * work.columns * work.split


@gluon.jit
def item_at(T: gl.constexpr, work, chunk, index):
    """Item number `index`: `GROUP` tiles of tokens go through all rows of the matrix together."""
    tile = index // work.split
    part = index % work.split
    rows = gl.cdiv(chunk.count, T.tokens)
    group = tile // (GROUP * work.columns)
    height = gl.minimum(rows - group * GROUP, GROUP)
    within = tile - group * GROUP * work.columns
    first = work.steps * part // work.split
    last = work.steps * (part + 1) // work.split
    column = gl.load(work.tiles + within // height)
    return Item(tile, group * GROUP + within % height, column, part, first, last)


@gluon.jit
def load_operands(T: gl.constexpr, x, w, work, chunk, operands):
    """The loader: the operands of this SM's items, step by step."""
    ring = operands.ring
    use = 0
    for index in range(gl.program_id(0), item_count(T, work, chunk), gl.num_programs(0)):
        item = item_at(T, work, chunk, index)
        for step in range(item.first, item.last):
            slot = wait_free(T.slots, ring, use, (T.tokens + T.tile) * K * 2)
            copy_page(x, [item.row * T.tokens, step * K], ring.full.index(slot), operands.x.index(slot))
            at = [work.place, item.column * (T.tile // BLOCK), step * BLOCK, 0]
            copy_page(w, at, ring.full.index(slot), operands.w.index(slot))
            use += 1


@gluon.jit
def multiply(T: gl.constexpr, operands, use, steps, WHO: gl.constexpr):
    """fp32 [64, tile]: the tokens of consumer `WHO` times the weights of `steps` uses of the ring from `use` on."""
    LAYOUT: gl.constexpr = accumulators(T.tile)
    ring = operands.ring
    acc = gl.zeros([ROWS, T.tile], gl.float32, LAYOUT)
    for step in range(steps):
        slot = wait_landed(T.slots, ring, use + step)
        x = operands.x.index(slot).slice(WHO * ROWS, ROWS)
        w = reinterpret(operands.w.index(slot), gl.bfloat16, [T.tile, K], OPERAND)
        acc = warpgroup_mma(x, w.permute([1, 0]), acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        if step > 0:
            release(T.slots, ring, use + step - 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(T.slots, ring, use + steps - 1)
    return acc


@gluon.jit
def add_parts(T: gl.constexpr, work, chunk, item, acc, WHO: gl.constexpr):
    """The sum of all parts of a tile and whether this one was the last to come; the others need not go on."""
    LAYOUT: gl.constexpr = accumulators(T.tile)
    SIZE: gl.constexpr = ROWS * T.tile
    TOGETHER: gl.constexpr = 256 // T.tile  # parts that are loaded together: as many as fit the registers
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, T.tile, gl.SliceLayout(0, LAYOUT))[None, :]
    known = (item.row * T.tokens + WHO * ROWS + rows < chunk.count) & (columns >= 0)
    place = item.tile * T.consumers + WHO
    parts = work.parts + place.to(gl.int64) * (work.split * SIZE) + rows * T.tile + columns
    gl.store(parts + item.part * SIZE, acc, mask=known, cache_modifier=".cg")
    barrier()
    arrived = gl.atomic_add(work.arrivals + place, 1, sem="acq_rel", scope="gpu")
    last = arrived == work.split - 1
    if last:
        acc = gl.zeros([ROWS, T.tile], gl.float32, LAYOUT)
        for part in range(0, work.split, TOGETHER):
            if TOGETHER == 4:
                first = gl.load(parts + part * SIZE, mask=known, other=0.0, cache_modifier=".cg")
                second = gl.load(
                    parts + (part + 1) * SIZE, mask=known & (part + 1 < work.split), other=0.0, cache_modifier=".cg"
                )
                third = gl.load(
                    parts + (part + 2) * SIZE, mask=known & (part + 2 < work.split), other=0.0, cache_modifier=".cg"
                )
                fourth = gl.load(
                    parts + (part + 3) * SIZE, mask=known & (part + 3 < work.split), other=0.0, cache_modifier=".cg"
                )
                acc = acc + first + second + third + fourth
            elif TOGETHER == 2:
                first = gl.load(parts + part * SIZE, mask=known, other=0.0, cache_modifier=".cg")
                second = gl.load(
                    parts + (part + 1) * SIZE, mask=known & (part + 1 < work.split), other=0.0, cache_modifier=".cg"
                )
                acc = acc + first + second
            else:
                acc += gl.load(parts + part * SIZE, mask=known, other=0.0, cache_modifier=".cg")
        gl.store(work.arrivals + place, 0)
    return acc, last
