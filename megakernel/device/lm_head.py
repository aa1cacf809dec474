"""Device side of `instructions.lm_head`: norm + LM head, and the best score of the run."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.columns.places import in_column, kept, position_of, request, sequence_of
from megakernel.device.formats.layouts import MMA_COLUMNS
from megakernel.device.matvec import ROWS, block_index, row_block, stage_norm
from megakernel.device.sampling import NO_ROW, best_of, load_sampling, score
from megakernel.device.stream import each_row_block, streams
from megakernel.device.sums import result_layout, width
from megakernel.device.values import rows_of


@gluon.jit
def put_scores(S: gl.constexpr, memory, here, logits, known):
    """Store the logits of a row block, where it is `known`; returns their rows, which of them there are, and their scores
    without noise."""
    index = block_index(S)
    row, column = index // 16, index % 16
    rows = here * ROWS + row
    inside = known & (rows < S.vocabulary)
    if S.logits_multiplier != 1.0:
        logits *= S.logits_multiplier
    target = in_column(S, memory.activations + S.logits, column, S.logits_column) + rows
    gl.store(target, logits, mask=inside & kept(S, column))
    scores = gl.where(gl.abs(logits) < float("inf"), logits, float("inf"))  # so that `Sample` learns of it
    return rows, inside, scores


@gluon.jit
def put_logits(S: gl.constexpr, memory, step, here, logits, known, state):
    """Store the logits of a row block, where it is `known`; returns the state with what is best of them and of those before,
    and its rows."""
    best, best_row, inverse_temperature, seed_low, seed_high = state
    rows, inside, scores = put_scores(S, memory, here, logits, known)
    if inverse_temperature > 0.0:
        scores = score(scores, rows, step.position, inverse_temperature, seed_low, seed_high)
    better = inside & (scores > best)
    return gl.where(better, scores, best), gl.where(better, rows, best_row), inverse_temperature, seed_low, seed_high


@gluon.jit
def lm_head(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the head; the best of them goes to `slot` of "best"."""
    stage_norm(
        S,
        memory,
        ring,
        step,
        rows_of(S, memory, step, S.x, S.layers),
        S.x,
        memory.constants + S.head.norm.first,
        S.head,
    )
    if S.columns == 1:
        score_one(S, memory, ring, step)
    else:
        score_columns(S, memory, ring, step)


@gluon.jit
def score_one(S: gl.constexpr, memory, ring, step):
    """The row blocks' logits, and the best of them, of a single column."""
    block, blocks, slot = step.record.a, step.record.b, step.record.c
    OUT: gl.constexpr = result_layout(S.columns)
    best = gl.full([ROWS, width(S.columns)], float("-inf"), gl.float32, OUT)
    best_row = gl.full([ROWS, width(S.columns)], 0, gl.int32, OUT)
    state = (best, best_row) + load_sampling(memory.control)
    if streams(S.head):
        state = each_row_block(S, memory, ring, step, block, blocks, S.head, put_logits, state)
    else:
        for i in range(blocks):
            logits = row_block(S, ring, step, step.use + i * S.head.pages, S.head)
            state = put_logits(S, memory, step, block + i, logits, True, state)
    best, best_row = state[0], state[1]
    top, top_row = best_of(gl.max(best, axis=1), gl.max(gl.where(best == gl.max(best, axis=1)[:, None], best_row, 0), axis=1))
    target = memory.activations + S.best + slot * 2
    gl.store(target, top)
    gl.store(target + 1, top_row.to(gl.float32))


@gluon.jit
def put_columns(S: gl.constexpr, memory, step, here, logits, known, state):
    """`put_logits` of several columns, each by its own request and position."""
    best, best_row, position, inverse, seed_low, seed_high, drawn = state
    rows, inside, scores = put_scores(S, memory, here, logits, known)
    if drawn != 0:
        noisy = score(scores, rows, position[None, :], inverse[None, :], seed_low[None, :], seed_high[None, :])
        scores = gl.where((inverse > 0.0)[None, :], noisy, scores)
    better = inside & (scores > best)
    best = gl.where(better, scores, best)
    return best, gl.where(better, rows, best_row), position, inverse, seed_low, seed_high, drawn


@gluon.jit
def score_columns(S: gl.constexpr, memory, ring, step):
    """The row blocks' logits, and the best of them, of each of several columns."""
    OUT: gl.constexpr = result_layout(S.columns)
    columns = gl.arange(0, MMA_COLUMNS, gl.SliceLayout(0, OUT))
    inverse, seed_low, seed_high = load_sampling(request(S, memory, sequence_of(S, columns)))
    position = position_of(S, memory, step, columns)
    drawn = gl.max((inverse > 0.0).to(gl.int32), axis=0)
    best = gl.full([ROWS, MMA_COLUMNS], float("-inf"), gl.float32, OUT)
    best_row = gl.full([ROWS, MMA_COLUMNS], 0, gl.int32, OUT)
    block, blocks, slot = step.record.a, step.record.b, step.record.c
    state = (best, best_row, position, inverse, seed_low, seed_high, drawn)
    if streams(S.head):
        state = each_row_block(S, memory, ring, step, block, blocks, S.head, put_columns, state)
    else:
        for i in range(blocks):
            logits = row_block(S, ring, step, step.use + i * S.head.pages, S.head)
            state = put_columns(S, memory, step, block + i, logits, True, state)
    best, best_row = state[0], state[1]
    top = gl.max(best, axis=0)
    top_row = gl.min(gl.where(best == top[None, :], best_row, NO_ROW), axis=0)
    target = memory.activations + S.best + columns * S.best_column + slot * 2
    gl.store(target, top, mask=columns < S.columns)
    gl.store(target + 1, top_row.to(gl.float32), mask=columns < S.columns)
