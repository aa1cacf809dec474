"""Time stamps, compiled in only where a geometry asks for a trace.

The clock is `globaltimer`: nanoseconds, the same on every SM.  A stamp is one 8-byte store by one thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.stamps import Point

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


@gluon.jit
def now():
    """Nanoseconds, int64."""
    return gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def stamp(S: gl.constexpr, trace, point: gl.constexpr):
    """Note the time at a point of a record's execution."""
    if S.trace:
        gl.store(trace + point, now())


@gluon.jit
def note(S: gl.constexpr, trace, point: gl.constexpr, value):
    """Note a duration."""
    if S.trace:
        gl.store(trace + point, value)
