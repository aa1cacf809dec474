"""Time stamps, compiled in only where a geometry asks for a trace.

A stamp is one 8-byte store by one thread: the cycles of its SM.  At both ends of a launch every SM notes a tick of the GPU's
clock with its cycles at that moment, from which `megakernel.stamps` makes nanoseconds.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles, nanoseconds
from megakernel.stamps import Clock, Point

FETCHED = gl.constexpr(int(Point.FETCHED))
READY = gl.constexpr(int(Point.READY))
LANDED = gl.constexpr(int(Point.LANDED))
COMPUTED = gl.constexpr(int(Point.COMPUTED))
STORED = gl.constexpr(int(Point.STORED))
SIGNALLED = gl.constexpr(int(Point.SIGNALLED))
LOAD_BEGUN = gl.constexpr(int(Point.LOAD_BEGUN))
LOAD_ENDED = gl.constexpr(int(Point.LOAD_ENDED))
LOAD_WAITED = gl.constexpr(int(Point.LOAD_WAITED))
STAGED = gl.constexpr(int(Point.STAGED))
POINTS = gl.constexpr(len(Point))
BEGIN_TIME = gl.constexpr(int(Clock.BEGIN_TIME))
BEGIN_CYCLE = gl.constexpr(int(Clock.BEGIN_CYCLE))
END_TIME = gl.constexpr(int(Clock.END_TIME))
END_CYCLE = gl.constexpr(int(Clock.END_CYCLE))
CLOCKS = gl.constexpr(len(Clock))
TICK_LOOKS = gl.constexpr(100_000)  # far more than a tick takes


@gluon.jit
def token_stamps(S: gl.constexpr, memory, token):
    """Where the stamps of one of a launch's tokens go, behind the clocks of all SMs."""
    return memory.stamps + gl.num_programs(0) * CLOCKS + token * (memory.bucket.records * POINTS)


@gluon.jit
def stamp(S: gl.constexpr, trace, point: gl.constexpr):
    """Note the time at a point of a record's execution."""
    if S.trace:
        gl.store(trace + point, cycles())


@gluon.jit
def note(S: gl.constexpr, trace, point: gl.constexpr, value):
    """Note a duration in cycles."""
    if S.trace:
        gl.store(trace + point, value)


@gluon.jit
def note_clocks(S: gl.constexpr, memory, sm, time_place: gl.constexpr, cycle_place: gl.constexpr):
    """Wait for a tick of the GPU's clock, and note it with the cycles of this SM."""
    if S.trace:
        before = nanoseconds()
        time = before
        looks = 0
        while (time == before) & (looks < TICK_LOOKS):
            time = nanoseconds()
            looks += 1
        cycle = cycles()
        gl.store(memory.stamps + sm * CLOCKS + time_place, time)
        gl.store(memory.stamps + sm * CLOCKS + cycle_place, cycle)
