"""The kernel of a skinny product: what a consumer does with its sums, and the launch's entry.

Where a tile lies with several thread blocks, each leaves its fp32 sums in global memory; whichever comes last adds all, in the
order of K.  So nobody waits for another block, and the same plan gives the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import aggregate, barrier
from megakernel.device.gemm.product import ROWS, accumulators, load_operands, make_operands, multiply
from megakernel.device.gemm.share import Share, block_of, first_unit
from megakernel.device.prefill.order import wait_for_previous

LOADER_REGISTERS = gl.constexpr(40)
PAIRS = gl.constexpr(128)  # consumers times tokens up to which two parts are added at once: as the registers allow


@aggregate
class Result:
    """Where the product goes: y, bf16 [tokens, rows]; the scales of x and W, fp32; parts of tiles and how many are there.

    parts: fp32 [block, 2, consumer, 64, tokens], what a block has of a tile that it shares with blocks before it, and of
    one that it begins but does not end.  arrivals: int32 [tile, consumer], zero between launches.
    """

    y: gl.tensor
    x_scale: gl.tensor
    w_scale: gl.tensor
    parts: gl.tensor
    arrivals: gl.tensor
    tokens: gl.tensor
    rows: gl.tensor


@gluon.jit
def part_address(T: gl.constexpr, result, block, begins, WHO: gl.constexpr):
    """Addresses of a block's sums [64, tokens]; `begins`: of the tile that it begins, not of the one that it goes on with."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, accumulators(T)))[:, None]
    tokens = gl.arange(0, T.tokens, gl.SliceLayout(0, accumulators(T)))[None, :]
    place = (block * 2 + begins) * T.consumers + WHO
    return result.parts + place * (ROWS * T.tokens) + rows * T.tokens + tokens


@gluon.jit
def add_parts(T: gl.constexpr, result, share, tile, acc, WHO: gl.constexpr):
    """Leave this block's sums of a tile; returns those of all blocks, and whether this block is the one to finish them."""
    block = gl.program_id(0)
    first = block_of(share, tile * share.steps)
    final = block_of(share, (tile + 1) * share.steps - 1)
    address = part_address(T, result, block, (block == first).to(gl.int32), WHO)
    gl.store(address, acc, cache_modifier=".cg")
    barrier()
    place = result.arrivals + tile * T.consumers + WHO
    last = gl.atomic_add(place, 1, sem="acq_rel", scope="gpu") == final - first
    if last:
        acc = gl.load(part_address(T, result, first, 1, WHO), cache_modifier=".cg")
        if T.consumers * T.tokens > PAIRS:
            for other in range(first + 1, final + 1):
                acc += gl.load(part_address(T, result, other, 0, WHO), cache_modifier=".cg")
        else:
            for other in range(first + 1, final + 1, 2):  # two at once: the loads' latency is what this takes
                one = gl.load(part_address(T, result, other, 0, WHO), cache_modifier=".cg")
                another = part_address(T, result, other + 1, 0, WHO)
                two = gl.load(another, mask=other < final, other=0.0, cache_modifier=".cg")
                acc = acc + one + two
        gl.store(place, 0)
    return acc, last


@gluon.jit
def finish(T: gl.constexpr, result, acc, x_scale, w_scale, rows):
    """Scale a tile's sums and store them."""
    tokens = gl.arange(0, T.tokens, gl.SliceLayout(0, accumulators(T)))
    if not T.wide:
        acc *= x_scale[None, :]
    acc *= w_scale[:, None]
    known = (rows < result.rows)[:, None] & (tokens < result.tokens)[None, :]
    place = result.y + tokens[None, :].to(gl.int64) * result.rows + rows[:, None]
    gl.store(place, acc.to(gl.bfloat16), mask=known)


@gluon.jit
def consume(T: gl.constexpr, operands, share, result, WHO: gl.constexpr):
    """Consumer `WHO`: its rows of every tile that this block has units of."""
    wait_for_previous()
    first = first_unit(share, gl.program_id(0))
    end = first_unit(share, gl.program_id(0) + 1)
    tokens = gl.arange(0, T.tokens, gl.SliceLayout(0, accumulators(T)))
    x_scale = gl.zeros([T.tokens], gl.float32, gl.SliceLayout(0, accumulators(T)))
    if not T.wide:
        x_scale = gl.load(result.x_scale + tokens, mask=tokens < result.tokens, other=0.0)
    use = 0
    for tile in range(first // share.steps, gl.cdiv(end, share.steps)):
        rows = (tile * T.consumers + WHO) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, accumulators(T)))
        w_scale = gl.load(result.w_scale + rows, mask=rows < result.rows, other=0.0)
        steps = gl.minimum(end, (tile + 1) * share.steps) - gl.maximum(first, tile * share.steps)
        acc = multiply(T, operands, use, steps, WHO)
        use += steps
        whole = True
        if steps < share.steps:
            acc, whole = add_parts(T, result, share, tile, acc, WHO)
        if whole:
            finish(T, result, acc, x_scale, w_scale, rows)


# Numbers on which nothing is specialised.
ARGUMENTS = ["tokens", "rows", "steps", "least", "more"]


@gluon.jit(do_not_specialize=ARGUMENTS)
def skinny_product(x, w, y, x_scale, w_scale, parts, arrivals, tokens, rows, steps, least, more, T: gl.constexpr):
    """y[tokens, rows] = x Wᵀ; x and w are TMA descriptors, T a `megakernel.gemm.plan.Tiling`."""
    share = Share(steps, least, more)
    result = Result(y, x_scale, w_scale, parts, arrivals, tokens, rows)
    operands = make_operands(T, x, w)
    if T.consumers == 4:
        gl.warp_specialize(
            [
                (consume, (T, operands, share, result, 0)),
                (consume, (T, operands, share, result, 1)),
                (consume, (T, operands, share, result, 2)),
                (consume, (T, operands, share, result, 3)),
                (load_operands, (T, x, w, operands, share)),
            ],
            [4, 4, 4, 1],
            [T.registers, T.registers, T.registers, LOADER_REGISTERS],
        )
    elif T.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (T, operands, share, result, 0)),
                (consume, (T, operands, share, result, 1)),
                (load_operands, (T, x, w, operands, share)),
            ],
            [4, 1],
            [T.registers, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [(consume, (T, operands, share, result, 0)), (load_operands, (T, x, w, operands, share))],
            [1],
            [LOADER_REGISTERS],
        )
