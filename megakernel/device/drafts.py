"""Device side of `instructions.drafts`: tokens that may come next, from where the last ones stood before."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions import drafts
from megakernel.device.formats.layouts import MMA_COLUMNS

LEAST = gl.constexpr(drafts.LEAST)
MOST = gl.constexpr(drafts.MOST)
WINDOW = gl.constexpr(drafts.WINDOW)
CHUNK = gl.constexpr(2048)  # places that are looked at together


@gluon.constexpr_function
def place_layout():
    """Places of one chunk, each thread's far apart: a warp's loads lie side by side."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def draft_layout():
    """Drafts, which every warp holds."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def same(tokens, places, back: gl.constexpr, end, inside):
    """Whether the token `back` before each of some places is that `back` before `end`, int32."""
    known = inside & (places >= back)
    last = gl.load(tokens + end - back, mask=end >= back, other=-1, cache_modifier=".cg")
    return (gl.load(tokens + places - back, mask=known, other=-2, cache_modifier=".cg") == last).to(gl.int32)


@gluon.jit
def look_up(tokens, end):
    """The place where the tokens up to `end` stood before, or -1."""
    first = gl.maximum(end - WINDOW, 0)
    best = gl.zeros([CHUNK], gl.int32, place_layout())
    for start in range(first, end, CHUNK):
        places = start + gl.arange(0, CHUNK, place_layout())
        inside = places < end
        agreed = same(tokens, places, 0, end, inside)
        run = agreed
        for back in gl.static_range(1, MOST):
            run = run * same(tokens, places, back, end, inside)
            agreed += run
        key = agreed * (2 * WINDOW) + (places - first)
        best = gl.maximum(best, gl.where(agreed >= LEAST, key, 0))
    top = gl.max(best, axis=0)
    return gl.where(top == 0, -1, first + top % (2 * WINDOW))


@gluon.jit
def continued(tokens, place, end):
    """The numbers of what followed a place, from the one after it on, [8]; behind `end` it goes on with itself."""
    number = gl.arange(0, MMA_COLUMNS, draft_layout())
    return gl.load(tokens + place + 1 + number % (end - place), cache_modifier=".cg")
