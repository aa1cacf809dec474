"""How the consumer gives pages of the ring back."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.compat import barrier


@gluon.jit
def give_back(ring, slot):
    """Give the page in a slot back to the loader, after a barrier that all warps have come to when they had read it.

    It is an arrival that expects 0 bytes: a plain one Triton takes for an access to all shared memory, so that the warps would
    meet again before the next.
    """
    mbarrier.expect(ring.empty.index(slot), 0)


@gluon.jit
def release(ring, slot):
    """Give the page in a slot back to the loader when all warps have read it; also a barrier."""
    barrier()
    give_back(ring, slot)
