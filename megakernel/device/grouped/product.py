"""y[rows of a group] = x[rows of the group] W[group]^T, for all groups in one persistent kernel.

A loader streams tiles of both operands by TMA, two consumers of four warps multiply them with wgmma.  The matrix's rows are
wgmma's M side, 64 a consumer, and tokens its N side: that is the side whose width can be chosen finely, and a group has any
number of tokens.  A tile takes the narrowest of `megakernel.grouped.tiling.WIDTHS` that holds it, at run time.

Operands are bf16, or e4m3 with a scale a row of each: a row of shared memory is 128 bytes, a step 64 or 128 columns.  Scales
multiply what is summed, before it is rounded to bf16.

A box of tokens may reach into the next group, or beyond x, where it reads zeros: such columns of the product are not stored.

Where W lies on the weight tape, a box is eight blocks of 16 rows by one tile, which lands as the same 128 rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from megakernel.device.compat import aggregate, copy_page, reinterpret
from megakernel.device.grouped.units import keep_units, staged_units
from megakernel.device.grouped.walk import TILE_ROWS, first_place, item_at, plan_work, seek
from megakernel.device.prefill.ring import Ring, make_ring, release, wait_free, wait_landed
from megakernel.grouped import tiling
from megakernel.options import BOX_LAYOUT
from models.tape import BLOCK_ROWS

LINE = gl.constexpr(tiling.LINE)
ROWS = gl.constexpr(tiling.CONSUMER_ROWS)
CONSUMERS = gl.constexpr(tiling.CONSUMERS)
MAIN, TAIL = gl.constexpr(tiling.MAIN), gl.constexpr(tiling.TAIL)
WIDTHS = gl.constexpr(tiling.WIDTHS)
BLOCK = gl.constexpr(BLOCK_ROWS)  # of the tape
BLOCKS = gl.constexpr(BOX_LAYOUT)  # of a box of them
BOX, SMALL_BOX = gl.constexpr(64), gl.constexpr(16)  # tokens that are loaded at once
PIECE = gl.constexpr(64)  # tokens that are stored together
# [64, tokens]: to each thread 8 rows of a token, 16 bytes, and to 8 threads all 64, a line of memory
STORED = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
STAGED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, transposed=True))
LOADER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)


@aggregate
class Output:
    """Where a product goes, bf16 [rows, n], and what multiplies it first if T.scaled: fp32 [rows] and [groups, n].

    If T.units, y is bf16 [rows, stride], and x_scale multiplies the units.
    """

    y: gl.tensor
    stride: gl.tensor
    x_scale: gl.tensor
    w_scale: gl.tensor


@aggregate
class Operands:
    """Slots of shared memory for tokens, [256, step] and what is beyond, [32, step], and for weights, [128, step], and
    their ring; for each consumer room for what it stores, [64, 64], or of units half."""

    main: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    w: gl.shared_memory_descriptor
    ring: Ring
    staged: gl.shared_memory_descriptor


@gluon.constexpr_function
def variants():
    """How many widths there are."""
    return len(WIDTHS.value)


@gluon.constexpr_function
def width(variant, part):
    """Tokens of the first or the second operand."""
    return WIDTHS.value[variant][part]


@gluon.constexpr_function
def most(variant):
    """Most tokens of a tile of a width; -1 has none."""
    return sum(WIDTHS.value[variant]) if variant >= 0 else 0


@gluon.constexpr_function
def accumulators(T, tokens):
    """[64, tokens] of a warpgroup; one instruction takes 32 bytes along K."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tokens, T.step.value // 4])


@gluon.jit
def make_room(T: gl.constexpr):
    """Shared memory for what is stored."""
    if T.units:
        return gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS // 2, PIECE], staged_units())
    else:
        return gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, PIECE], STAGED)


@gluon.jit
def make_operands(T: gl.constexpr, x, w):
    """Shared memory for the slots."""
    return Operands(
        gl.allocate_shared_memory(x.dtype, [T.slots, MAIN, T.step], x.layout),
        gl.allocate_shared_memory(x.dtype, [T.slots, TAIL, T.step], x.layout),
        gl.allocate_shared_memory(w.dtype, [T.slots, TILE_ROWS, T.step], x.layout),
        make_ring(T.slots, CONSUMERS),
        make_room(T),
    )


@gluon.jit
def second_operand(operands, slot, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """Where a slot has the tokens after the first `FIRST`."""
    if FIRST + SECOND <= MAIN:
        return operands.main.index(slot).slice(FIRST, SECOND)
    else:
        return operands.tail.index(slot).slice(0, SECOND)


@gluon.jit
def load_tokens(x, few, row, column, barrier, memory, COUNT: gl.constexpr):
    """`COUNT` tokens into the beginning of a slot's memory."""
    if COUNT >= BOX:
        for box in gl.static_range(COUNT // BOX):
            copy_page(x, [row + box * BOX, column], barrier, memory.slice(box * BOX, BOX))
    else:
        for box in gl.static_range(COUNT // SMALL_BOX):
            copy_page(few, [row + box * SMALL_BOX, column], barrier, memory.slice(box * SMALL_BOX, SMALL_BOX))


@gluon.jit
def load_weights(T: gl.constexpr, w, work, item, column, barrier, memory):
    """A tile's rows of the matrix, from a column of K on, into a slot's memory."""
    if T.paged:
        at = [0, (item.group * work.n + item.column * TILE_ROWS) // BLOCK, column // T.step * BLOCK, 0]
        copy_page(w, at, barrier, reinterpret(memory, w.dtype, [1, TILE_ROWS // BLOCK, BLOCK, T.step], BLOCKS))
    else:
        copy_page(w, [item.group * work.n + item.column * TILE_ROWS, column], barrier, memory)


@gluon.jit
def load_tile(T: gl.constexpr, x, few, w, work, operands, item, use, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """The operands of one tile, step by step."""
    ring = operands.ring
    for step in range(work.steps):
        slot = wait_free(T.slots, ring, use + step, (FIRST + SECOND + TILE_ROWS) * LINE)
        full, column = ring.full.index(slot), step * T.step
        load_weights(T, w, work, item, column, full, operands.w.index(slot))
        load_tokens(x, few, item.start, column, full, operands.main.index(slot), FIRST)
        if SECOND > 0:
            load_tokens(x, few, item.start + FIRST, column, full, second_operand(operands, slot, FIRST, SECOND), SECOND)


@gluon.jit
def load_operands(T: gl.constexpr, x, few, w, work, operands):
    """The loader: the operands of this SM's tiles."""
    use = 0
    place = first_place(work)
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        place = seek(work, place, index)
        item = item_at(work, place, index)
        for V in gl.static_range(variants()):
            if (item.count > most(V - 1)) & (item.count <= most(V)):
                load_tile(T, x, few, w, work, operands, item, use, width(V, 0), width(V, 1))
        use += work.steps


@gluon.jit
def multiply(T: gl.constexpr, operands, use, steps, TOKENS: gl.constexpr, WHO: gl.constexpr):
    """fp32 [64, TOKENS]: the matrix's rows of consumer `WHO` times so many tokens, over `steps` uses of the ring."""
    ring = operands.ring
    acc = gl.zeros([ROWS, TOKENS], gl.float32, accumulators(T, TOKENS))
    for step in range(steps):
        slot = wait_landed(T.slots, ring, use + step)
        w = operands.w.index(slot).slice(WHO * ROWS, ROWS)
        x = operands.main.index(slot).slice(0, TOKENS)
        acc = warpgroup_mma(w, x.permute([1, 0]), acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        if step > 0:
            release(T.slots, ring, use + step - 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(T.slots, ring, use + steps - 1)
    return acc


@gluon.jit
def multiply_both(T: gl.constexpr, operands, use, steps, FIRST: gl.constexpr, SECOND: gl.constexpr, WHO: gl.constexpr):
    """As `multiply`, for tokens of both operands: fp32 [64, FIRST] and [64, SECOND]."""
    ring = operands.ring
    acc = gl.zeros([ROWS, FIRST], gl.float32, accumulators(T, FIRST))
    more = gl.zeros([ROWS, SECOND], gl.float32, accumulators(T, SECOND))
    for step in range(steps):
        slot = wait_landed(T.slots, ring, use + step)
        w = operands.w.index(slot).slice(WHO * ROWS, ROWS)
        x = operands.main.index(slot).slice(0, FIRST)
        rest = second_operand(operands, slot, FIRST, SECOND)
        acc = warpgroup_mma(w, x.permute([1, 0]), acc, use_acc=step > 0, is_async=True)
        more = warpgroup_mma(w, rest.permute([1, 0]), more, use_acc=step > 0, is_async=True)
        acc, more = warpgroup_mma_wait(2, deps=[acc, more])
        if step > 0:
            release(T.slots, ring, use + step - 1)
    acc, more = warpgroup_mma_wait(0, deps=[acc, more])
    release(T.slots, ring, use + steps - 1)
    return acc, more


@gluon.jit
def scaled(out, work, item, acc, FIRST: gl.constexpr, WHO: gl.constexpr):
    """A piece of a tile times the scales of its matrix's rows and of its tokens."""
    LAYOUT: gl.constexpr = acc.type.layout
    rows = item.column * TILE_ROWS + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    tokens = FIRST + gl.arange(0, acc.shape[1], gl.BlockedLayout([1], [32], [4], [0]))
    of_rows = gl.load(out.w_scale + item.group * work.n + rows, mask=rows < work.n, other=0.0)
    of_tokens = gl.load(out.x_scale + item.start + tokens, mask=tokens < item.count, other=0.0)
    return acc * of_rows[:, None] * gl.convert_layout(of_tokens, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def keep(T: gl.constexpr, out, work, staged, item, acc, FIRST: gl.constexpr, WHO: gl.constexpr):
    """Store a tile's tokens from number `FIRST` on, those that the tile has; `acc` is [64, tokens]."""
    TOKENS: gl.constexpr = acc.shape[1]
    if TOKENS > PIECE:
        left, right = gl.split(gl.permute(gl.reshape(acc, [ROWS, 2, TOKENS // 2]), [0, 2, 1]))
        keep(T, out, work, staged, item, left, FIRST, WHO)
        keep(T, out, work, staged, item, right, FIRST + TOKENS // 2, WHO)
    elif T.units:
        keep_units(out, work, staged, item, acc, FIRST, WHO)
    else:
        LAYOUT: gl.constexpr = STORED
        if T.scaled:
            acc = scaled(out, work, item, acc, FIRST, WHO)
        room = staged.slice(0, TOKENS, dim=1)
        room.store(acc.to(gl.bfloat16))
        values = room.load(LAYOUT)
        rows = item.column * TILE_ROWS + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
        tokens = FIRST + gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))[None, :]
        place = out.y + item.start.to(gl.int64) * out.stride + (tokens * out.stride + rows)
        gl.store(place, values, mask=(tokens < item.count) & (rows < work.n))


@gluon.jit
def consume_tile(T: gl.constexpr, out, work, operands, item, use, FIRST: gl.constexpr, SECOND: gl.constexpr, WHO: gl.constexpr):
    """Multiply one tile and store it."""
    staged = operands.staged.index(WHO)
    if SECOND > 0:
        acc, more = multiply_both(T, operands, use, work.steps, FIRST, SECOND, WHO)
        keep(T, out, work, staged, item, more, FIRST, WHO)
    else:
        acc = multiply(T, operands, use, work.steps, FIRST, WHO)
    keep(T, out, work, staged, item, acc, 0, WHO)


@gluon.jit
def consume(T: gl.constexpr, out, work, operands, WHO: gl.constexpr):
    """Consumer `WHO`: its rows of the matrix in all of this SM's tiles."""
    use = 0
    place = first_place(work)
    for index in range(gl.program_id(0), work.items, gl.num_programs(0)):
        place = seek(work, place, index)
        item = item_at(work, place, index)
        for V in gl.static_range(variants()):
            if (item.count > most(V - 1)) & (item.count <= most(V)):
                consume_tile(T, out, work, operands, item, use, width(V, 0), width(V, 1), WHO)
        use += work.steps


@gluon.jit(do_not_specialize=["groups", "rows", "band"])
def grouped_kernel(x, few, w, x_scale, w_scale, offsets, y, groups, rows, n, k, band, T: gl.constexpr):
    """x and few: tensor maps of [rows, k] by boxes of 64 and 16 rows; w: of [groups * n, k]; y: bf16 [rows, n].

    x_scale and w_scale are not looked at unless T.scaled.
    """
    work = plan_work(T, offsets, groups, rows, n, k, band)
    operands = make_operands(T, x, w)
    out = Output(y, n, x_scale, w_scale)
    gl.warp_specialize(
        [
            (consume, (T, out, work, operands, 0)),
            (consume, (T, out, work, operands, 1)),
            (load_operands, (T, x, few, w, work, operands)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )
