"""Softmax of attention's scores, block by block, relative to bases that hardly ever change.

A query's weights are 2^(score - base), with scores in powers of two, and its result is divided by their sum.  The base is the
query's maximum in the first block, the one that it stands in: later blocks need no maximum, and nothing that was added is
scaled again.  fp32 and bf16 have the range for it, up to scores that exceed the base by 60.  Where one does, its sum says so
at the end, as no sum ever shrinks; then the same is done with bases that are raised whenever a sum has passed the bound (the
rescaling of online softmax, Milakov and Gimelshein 2018; that it may be rare is FlashAttention 4's idea).  A query whose sum
keeps below the bound has the same bits either way, so they do not depend on which queries shared its SM.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

QUERIES = gl.constexpr(64)  # of one consumer
LOG2_E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(-1.0e37)  # the base of a query that has seen no key yet: below every score, and finite
BOUND = gl.constexpr(2.0**60)  # of a sum: some 2^67 of the largest weights fit fp32 above it
RAISE = gl.constexpr(40.0)  # by which a base is raised at least


@gluon.jit
def masked(A: gl.constexpr, scores, positions, block):
    """Scores [64, keys] of a block, -inf for keys after the query's own position.

    Keys are compared by eights, whose numbers are constants in the machine code.
    """
    eights = gl.reshape(scores, [QUERIES, A.keys // 8, 8])
    LAYOUT: gl.constexpr = eights.type.layout
    own = gl.convert_layout(positions, gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT))) - block * A.keys
    last = own[:, None] - gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :]
    firsts = 8 * gl.arange(0, A.keys // 8, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    seen = gl.expand_dims(firsts[None, :], 2) <= gl.expand_dims(last, 1)
    seen_scores = gl.where(seen, eights, float("-inf"))
    return gl.convert_layout(gl.reshape(seen_scores, [QUERIES, A.keys]), scores.type.layout)


@gluon.jit
def bases(A: gl.constexpr, scores):
    """Each query's maximum of a block's scores [64, keys], in powers of two; LEAST where it sees none of the keys."""
    return gl.maximum(gl.max(scores, axis=1) * (A.scale * LOG2_E), LEAST)


@gluon.jit
def weigh(A: gl.constexpr, scores, base):
    """A block's weights [64, keys], and their sums [64, 8].

    A query's sum is kept in 8 parts, of every eighth key, so that no threads need to exchange them before the end.
    """
    FACTOR: gl.constexpr = A.scale * LOG2_E
    weights = gl.exp2(scores * FACTOR - base[:, None])
    return weights, gl.sum(gl.reshape(weights, [QUERIES, A.keys // 8, 8]), axis=1)


@gluon.jit
def sums_of_none(A: gl.constexpr, scores):
    """Sums [64, 8] of no keys."""
    return gl.sum(gl.reshape(gl.zeros_like(scores), [QUERIES, A.keys // 8, 8]), axis=1)


@gluon.jit
def too_large(total):
    """Whether one of some sums has passed the bound."""
    return gl.max(gl.max(total, axis=1), axis=0) > BOUND


@gluon.jit
def raised(A: gl.constexpr, scores, base, total):
    """Bases with which a block's scores are weighed whose sums would otherwise be `total`: where that passes the bound, this
    block's maximum, and at least so much more that the sum is far below it; and what is there already shrinks by."""
    most = gl.convert_layout(gl.max(total, axis=1), base.type.layout)
    new = gl.where(most > BOUND, gl.maximum(bases(A, scores), base + RAISE), base)
    return new, gl.exp2(base - new)


@gluon.jit
def finish_weights(total):
    """Have all weights that are summed in `total` computed here.

    The assembler moves a wait for the matrix instruction ahead of all arithmetic that does not need its result, and so would
    have the values' product finished before the weights are begun.  It moves none ahead of an event that depends on them; no
    sum is negative, and the event never happens.
    """
    gl.inline_asm_elementwise(
        """
        {
        .reg .b32 signs;
        .reg .pred negative;
        or.b32 signs, $4, $5;
        or.b32 signs, signs, $6;
        or.b32 signs, signs, $7;
        setp.lt.s32 negative, signs, 0;
        @negative pmevent 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r",
        [total],
        gl.int32,
        is_pure=False,
        pack=4,
    )
