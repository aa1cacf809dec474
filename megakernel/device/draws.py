"""Sampling among the rows that top_k and top_p keep, from the logits themselves: `instructions.sampling.draw`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.context import TOP_K, TOP_P
from megakernel.device.sampling import best_of, ordered, score

CHUNK = gl.constexpr(2048)  # logits in registers at a time
TOGETHER = gl.constexpr(4)  # chunks whose loads are in flight together
LOWEST = gl.constexpr(-2147483647)  # below the key of every number


@gluon.constexpr_function
def chunk_layout():
    """Logits of one chunk."""
    return gl.BlockedLayout([4], [32], [4], [0])


@gluon.jit
def load_chunk(S: gl.constexpr, logits, start, inverse_temperature):
    """Rows and tempered logits of one chunk; -inf beyond the vocabulary."""
    rows = start + gl.arange(0, CHUNK, chunk_layout())
    places = logits + rows
    inside = rows < S.vocabulary
    z = gl.load(places, mask=inside, other=float("-inf"), cache_modifier=".cg") * inverse_temperature
    return rows, z


@gluon.jit
def largest(S: gl.constexpr, logits, inverse_temperature):
    """The largest tempered logit."""
    top = gl.full([CHUNK], float("-inf"), gl.float32, chunk_layout())
    for start in range(0, S.vocabulary, CHUNK * TOGETHER):
        for j in gl.static_range(TOGETHER):
            rows, z = load_chunk(S, logits, start + j * CHUNK, inverse_temperature)
            top = gl.maximum(top, z)
    return gl.max(top, axis=0)


@gluon.jit
def mass(S: gl.constexpr, logits, inverse_temperature, lowest, top, COUNTING: gl.constexpr):
    """Over the rows whose key is at least `lowest`: how many they are, or their summed exp(z - top); fp32."""
    total = gl.zeros([CHUNK], gl.float32, chunk_layout())
    for start in range(0, S.vocabulary, CHUNK * TOGETHER):
        for j in gl.static_range(TOGETHER):
            rows, z = load_chunk(S, logits, start + j * CHUNK, inverse_temperature)
            kept = (ordered(z) >= lowest) & (rows < S.vocabulary)
            weight = 1.0 if COUNTING else gl.exp(z - top)
            total += gl.where(kept, weight, 0.0)
    return gl.sum(total, axis=0)


@gluon.jit
def threshold(S: gl.constexpr, logits, inverse_temperature, lowest, top, wanted, COUNTING: gl.constexpr):
    """The largest key, not below `lowest`, whose rows with those above still reach `wanted`, by bisecting the fp32 numbers.

    Where it meets `wanted` exactly it need not go on: the rows between are none.
    """
    low = gl.to_tensor(lowest).to(gl.int64)
    high = ordered(top).to(gl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        found = mass(S, logits, inverse_temperature, middle.to(gl.int32), top, COUNTING)
        if found >= wanted:
            low = middle
            if COUNTING:
                if found == wanted:
                    high = middle
        else:
            high = middle - 1
    return low.to(gl.int32)


@gluon.jit
def draw(S: gl.constexpr, logits, request, position, inverse_temperature, seed_low, seed_high):
    """Sample one of the rows that top_k and top_p of a request keep, for a position."""
    top = largest(S, logits, inverse_temperature)
    cut = gl.to_tensor(LOWEST)
    top_k = gl.load(request + TOP_K)
    if (top_k > 0) & (top_k < S.vocabulary):
        cut = threshold(S, logits, inverse_temperature, cut, top, top_k.to(gl.float32), True)
    top_p = gl.load(request + TOP_P).to(gl.float32, bitcast=True)
    if top_p < 1.0:
        wanted = top_p * mass(S, logits, inverse_temperature, cut, top, False)
        cut = threshold(S, logits, inverse_temperature, cut, top, wanted, False)
    best = gl.to_tensor(float("-inf"))
    token = gl.to_tensor(0)
    for start in range(0, S.vocabulary, CHUNK):
        rows, z = load_chunk(S, logits, start, inverse_temperature)
        kept = (ordered(z) >= cut) & (rows < S.vocabulary)
        if gl.max(kept.to(gl.int32), axis=0) > 0:  # most chunks hold none, and noise is dear
            scores = score(z, rows, position, 1.0, seed_low, seed_high)
            chunk_best, chunk_row = best_of(gl.where(kept, scores, float("-inf")), rows)
            token = gl.where(chunk_best > best, chunk_row, token)
            best = gl.maximum(best, chunk_best)
    return token
