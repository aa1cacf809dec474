"""A ring of slots of shared memory between one loader, which fills them by TMA, and the consumers of a prefill kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.compat import aggregate


@aggregate
class Ring:
    """The barriers of its slots: `full` opens when what was expected has landed, `empty` when every consumer has let go."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def make_ring(SLOTS: gl.constexpr, CONSUMERS: gl.constexpr):
    """The barriers of `SLOTS` slots that so many consumers read.

    Those of one kind are memory that the compiler takes for one thing, and puts a barrier of the block between any two of
    them: so both kinds take turns.
    """
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return Ring(full, empty)


@gluon.jit
def wait_landed(SLOTS: gl.constexpr, ring, use, pred=True):
    """Wait until use number `use` of the ring has landed, if `pred`; returns its slot."""
    slot = use % SLOTS
    mbarrier.wait(ring.full.index(slot), (use // SLOTS) & 1, pred=pred)
    return slot


@gluon.jit
def wait_free(SLOTS: gl.constexpr, ring, use, bytes: gl.constexpr):
    """Wait until the slot of use number `use` is free and expect `bytes` there; returns the slot."""
    slot = use % SLOTS
    mbarrier.wait(ring.empty.index(slot), ((use // SLOTS) & 1) ^ 1)
    mbarrier.expect(ring.full.index(slot), bytes)
    return slot


@gluon.jit
def release(SLOTS: gl.constexpr, ring, use, pred=True):
    """A consumer has read use number `use`, if `pred`."""
    mbarrier.arrive(ring.empty.index(use % SLOTS), count=1, pred=pred)
