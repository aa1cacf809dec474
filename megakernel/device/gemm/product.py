"""Loading and multiplying: W's rows are the rows of the matrix instruction, the tokens its columns.

So the instruction, whose 64 rows are always full, wastes nothing where tokens are few: it takes 8, 16, 32 or 64 of them.  One
loader streams steps of both operands by TMA through a ring that fills nearly all of shared memory; every consumer multiplies
its 64 rows of a tile.

FP8 times FP8 goes from shared memory to the tensor cores, which on Hopper keep only about 14 bits of a sum of FP8 products
(DeepSeek-V3 Technical Report, section 3.3.2).  So no such sum is longer than a step: it is then added to fp32 registers.  For
bf16 tokens W is widened in registers; every e4m3 number is a bf16 number.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from megakernel.device.compat import aggregate, copy_page
from megakernel.device.gemm.share import first_unit
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.ring import Ring, make_ring, release, wait_free, wait_landed

K = gl.constexpr(128)  # columns of a box of W: 128 bytes
ROWS = gl.constexpr(64)  # of W, of one consumer


@aggregate
class Operands:
    """Slots of shared memory for W [64 a consumer, 128] and for x [tokens, 128], some boxes a slot, and their ring."""

    w: gl.shared_memory_descriptor
    x: gl.shared_memory_descriptor
    ring: Ring


@gluon.constexpr_function
def accumulators(T):
    """The layout of W's rows by tokens, fp32 [64, tokens], of a consumer."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, T.tokens, 16 if T.wide else 32])


@gluon.constexpr_function
def step_bytes(T):
    """What a step brings."""
    return T.boxes * K.value * (T.consumers * ROWS.value + T.tokens * (2 if T.wide else 1))


@gluon.jit
def make_operands(T: gl.constexpr, x, w):
    """Shared memory for the boxes of two descriptors."""
    return Operands(
        gl.allocate_shared_memory(w.dtype, [T.slots * T.boxes, T.consumers * ROWS, K], w.layout),
        gl.allocate_shared_memory(x.dtype, [T.slots * T.boxes, T.tokens, K], x.layout),
        make_ring(T.slots, T.consumers),
    )


@gluon.jit
def load_weights(T: gl.constexpr, w, operands, share, unit, slot):
    """Begin to copy a unit's part of W."""
    row, column = unit // share.steps * (T.consumers * ROWS), unit % share.steps * (T.boxes * K)
    for box in gl.static_range(T.boxes):
        copy_page(w, [row, column + box * K], operands.ring.full.index(slot), operands.w.index(slot * T.boxes + box))


@gluon.jit
def load_tokens(T: gl.constexpr, x, operands, share, unit, slot):
    """Begin to copy a unit's part of x."""
    column = unit % share.steps * (T.boxes * K)
    for box in gl.static_range(T.boxes):
        copy_page(x, [0, column + box * K], operands.ring.full.index(slot), operands.x.index(slot * T.boxes + box))


@gluon.jit
def load_operands(T: gl.constexpr, x, w, operands, share):
    """The loader: this block's units.  W may be read before the kernel before this one has ended, x may not."""
    first = first_unit(share, gl.program_id(0))
    units = first_unit(share, gl.program_id(0) + 1) - first
    ahead = gl.minimum(units, T.slots)
    for use in range(ahead):
        mbarrier.expect(operands.ring.full.index(use), step_bytes(T))
        load_weights(T, w, operands, share, first + use, use)
    wait_for_previous()
    for use in range(ahead):
        load_tokens(T, x, operands, share, first + use, use)
    for use in range(ahead, units):
        slot = wait_free(T.slots, operands.ring, use, step_bytes(T))
        load_weights(T, w, operands, share, first + use, slot)
        load_tokens(T, x, operands, share, first + use, slot)
    let_next_start()  # not before: what the next kernel loads would delay what this one has to


@gluon.jit
def multiply_narrow(T: gl.constexpr, operands, use, steps, WHO: gl.constexpr):
    """fp32 [64, tokens]: consumer `WHO`'s rows of W times the tokens, over `steps` uses of the ring from `use` on; FP8."""
    acc = gl.zeros([ROWS, T.tokens], gl.float32, accumulators(T))
    for step in range(steps):
        slot = wait_landed(T.slots, operands.ring, use + step)
        short = gl.zeros([ROWS, T.tokens], gl.float32, accumulators(T))
        for box in gl.static_range(T.boxes):
            w = operands.w.index(slot * T.boxes + box).slice(WHO * ROWS, ROWS)
            x = operands.x.index(slot * T.boxes + box).permute([1, 0])
            short = warpgroup_mma(w, x, short, use_acc=box > 0, is_async=True)
        short = warpgroup_mma_wait(0, deps=[short])
        release(T.slots, operands.ring, use + step)
        acc += short
    return acc


@gluon.jit
def widened(T: gl.constexpr, operands, place, WHO: gl.constexpr):
    """A box of consumer `WHO`'s rows of W as bf16, exactly, in registers.

    By way of fp32, because Hopper converts fp16 to bf16 one by one in its slowest unit.
    """
    WIDENED: gl.constexpr = gl.DotOperandLayout(0, accumulators(T), 2)
    w = operands.w.index(place).slice(WHO * ROWS, ROWS).load(WIDENED)
    return w.to(gl.float16).to(gl.float32).to(gl.bfloat16)


@gluon.jit
def multiply_wide(T: gl.constexpr, operands, use, steps, WHO: gl.constexpr):
    """The same for tokens in bf16; while a box is multiplied, the next of its step is widened."""
    acc = gl.zeros([ROWS, T.tokens], gl.float32, accumulators(T))
    for step in range(steps):
        slot = wait_landed(T.slots, operands.ring, use + step)
        w = widened(T, operands, slot * T.boxes, WHO)
        for box in gl.static_range(T.boxes):
            x = operands.x.index(slot * T.boxes + box).permute([1, 0])
            under_way = warpgroup_mma(w, x, acc, is_async=True)
            if box + 1 < T.boxes:
                following = widened(T, operands, slot * T.boxes + box + 1, WHO)
                acc, w = warpgroup_mma_wait(0, deps=[under_way, w])
                w = following
            else:
                acc = warpgroup_mma_wait(0, deps=[under_way])
        release(T.slots, operands.ring, use + step)
    return acc


@gluon.jit
def multiply(T: gl.constexpr, operands, use, steps, WHO: gl.constexpr):
    """fp32 [64, tokens]: consumer `WHO`'s rows of W times the tokens, over `steps` uses of the ring from `use` on."""
    if T.wide:
        return multiply_wide(T, operands, use, steps, WHO)
    else:
        return multiply_narrow(T, operands, use, steps, WHO)
