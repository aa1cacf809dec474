"""Device side of `instructions.sampling`: Gumbel noise by Philox, thresholds by bisection."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.sampling import PHILOX_M, PHILOX_ROUNDS, PHILOX_W
from megakernel.device.context import INVERSE_TEMPERATURE, SEED_HIGH, SEED_LOW

M0 = gl.constexpr(PHILOX_M[0])
M1 = gl.constexpr(PHILOX_M[1])
W0 = gl.constexpr(PHILOX_W[0])
W1 = gl.constexpr(PHILOX_W[1])
ROUNDS = gl.constexpr(PHILOX_ROUNDS)
NO_ROW = gl.constexpr(2147483647)  # behind every row


@gluon.jit
def load_sampling(request):
    """1 / temperature (0: greedy) and the seed's two halves, of requests whose words lie there."""
    inverse = gl.load(request + INVERSE_TEMPERATURE).to(gl.float32, bitcast=True)
    return inverse, gl.load(request + SEED_LOW).to(gl.uint32), gl.load(request + SEED_HIGH).to(gl.uint32)


@gluon.jit
def philox(rows, position, key_low, key_high):
    """First output of Philox4x32-10 for counters (row, position, 0, 0), uint32."""
    c0 = rows.to(gl.uint32)
    c1 = gl.full(rows.shape, 0, gl.uint32, rows.type.layout) + position.to(gl.uint32)
    c2 = gl.full(rows.shape, 0, gl.uint32, rows.type.layout)
    c3 = gl.full(rows.shape, 0, gl.uint32, rows.type.layout)
    m0 = gl.full(rows.shape, M0, gl.uint32, rows.type.layout)
    m1 = gl.full(rows.shape, M1, gl.uint32, rows.type.layout)
    for _ in gl.static_range(ROUNDS):
        high0, low0 = gl.umulhi(c0, m0), c0 * m0
        high1, low1 = gl.umulhi(c2, m1), c2 * m1
        c0, c2 = high1 ^ c1 ^ key_low, high0 ^ c3 ^ key_high
        c1, c3 = low1, low0
        key_low += W0
        key_high += W1
    return c0


@gluon.jit
def score(logits, rows, position, inverse_temperature, seed_low, seed_high):
    """logit / temperature + Gumbel noise of the row."""
    u = ((philox(rows, position, seed_low, seed_high) >> 9).to(gl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return logits * inverse_temperature - gl.log(-gl.log(u))


@gluon.jit
def best_of(scores, rows):
    """The largest score and the lowest row that has it."""
    best = gl.max(scores, axis=0)
    return best, gl.min(gl.where(scores == best, rows, 2147483647), axis=0)


@gluon.jit
def ordered(values):
    """fp32 values as int32 numbers in the same order."""
    bits = values.to(gl.int32, bitcast=True)
    return gl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
