"""What the consumers of a prefill kernel found, told to each other and to the loader."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.compat import aggregate


@aggregate
class Verdict:
    """What each consumer found, int32 [consumers, 1], and a barrier that opens when all have said it."""

    found: gl.shared_memory_descriptor
    said: gl.shared_memory_descriptor


@gluon.jit
def make_verdict(CONSUMERS: gl.constexpr):
    """A verdict that nobody has spoken on."""
    found = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    said = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(said, count=CONSUMERS)
    return Verdict(found, said)


@gluon.jit
def say(verdict, WHO: gl.constexpr, failed):
    """Consumer `WHO` has come to its end, and whether it failed."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    verdict.found.index(WHO).store(gl.full([1], 0, gl.int32, LAYOUT) + failed.to(gl.int32))
    mbarrier.arrive(verdict.said, count=1)


@gluon.jit
def wait_for_verdict(CONSUMERS: gl.constexpr, verdict):
    """Whether any consumer failed, once all have come to their end."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(verdict.said, 0)
    failed = 0
    for who in gl.static_range(CONSUMERS):
        failed |= gl.max(verdict.found.index(who).load(LAYOUT), axis=0)
    return failed != 0
