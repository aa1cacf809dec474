"""Device side of `instructions.choose`: the k best of a layer's experts, and their shares of the softmax.

Every score is compared with every other: an expert's rank is the number of those before it, and its place in the choice.  So
there is no loop over the k, and the order does not depend on who compares first.  A thread has one expert, and compares it with
some others at a time, out of shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.formats.packed import FLAT
from megakernel.device.sync import ALL, wait_all
from megakernel.device.trace import STAGED, stamp
from megakernel.device.values import look, look_again, put, rows_of, vacant
from models.config import MOST_EXPERTS

TOGETHER = gl.constexpr(16)  # experts that each is compared with at a time
SIZE = gl.constexpr(MOST_EXPERTS)  # one for each of the consumer's threads, so that each warp has its own
LOWEST = gl.constexpr(-(2**31))  # below the place of any score


@gluon.constexpr_function
def pairs_layout():
    """[experts, those that they are compared with]."""
    return gl.BlockedLayout([1, TOGETHER.value], [32, 1], [4, 1], [1, 0])


@gluon.jit
def ordered(scores):
    """fp32 numbers as int32 in the same order, both zeros equal; what is no number has a place among them, too."""
    bits = scores.to(gl.int32, bitcast=True)
    return gl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@gluon.jit
def choose(S: gl.constexpr, memory, ring, step):
    """The layer's choice: numbers of experts, the best first, and behind them their weights."""
    PAIRS: gl.constexpr = pairs_layout()
    COUNT: gl.constexpr = S.experts.total
    PARTS: gl.constexpr = (COUNT + TOGETHER - 1) // TOGETHER
    wait_all(S, memory, step, ALL)
    layer = step.record.layer
    expert = gl.arange(0, SIZE, gl.SliceLayout(1, PAIRS))
    known = expert < COUNT
    source = rows_of(S, memory, step, S.scores, layer) + expert
    scores = look(source, known)
    begin = cycles()
    waiting = look_again(memory, step, begin, vacant(scores))
    while waiting != 0:
        scores = look(source, known)
        waiting = look_again(memory, step, begin, vacant(scores))
    keys = gl.where(known, ordered(scores), LOWEST)
    reinterpret(ring.staging, gl.int32, [1, SIZE], FLAT).index(0).store(keys)
    share = gl.where(known, gl.exp(scores - gl.max(gl.where(known, scores, float("-inf")), axis=0)), 0.0)
    barrier()
    stamp(S, step.trace, STAGED)
    staged = reinterpret(ring.staging, gl.int32, [SIZE // TOGETHER, TOGETHER], FLAT)
    rank = gl.full([SIZE], 0, gl.int32, gl.SliceLayout(1, PAIRS))
    for part in range(PARTS):
        other = part * TOGETHER + gl.arange(0, TOGETHER, gl.SliceLayout(0, PAIRS))
        key, others = keys[:, None], staged.index(part).load(gl.SliceLayout(0, PAIRS))[None, :]
        earlier = (others > key) | ((others == key) & (other[None, :] < expert[:, None]))
        rank += gl.sum(earlier.to(gl.int32), axis=1)
    taken = known & (rank < S.experts.chosen)
    if S.experts.renormalised:
        total = gl.sum(gl.where(taken, share, 0.0), axis=0)
    else:
        total = gl.sum(share, axis=0)
    target = rows_of(S, memory, step, S.choice, layer) + rank
    put(S, step, target, expert.to(gl.float32), taken)
    put(S, step, target + S.experts.chosen, share / total, taken)
