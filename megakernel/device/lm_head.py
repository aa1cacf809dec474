"""Device side of `instructions.lm_head`: norm + LM head, and the best score of the run."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.layouts import MMA_COLUMNS
from megakernel.device.matvec import ROWS, block_index, row_block, stage_norm
from megakernel.device.sampling import best_of, load_sampling, score
from megakernel.device.stream import each_row_block, result_layout, streams
from megakernel.device.values import rows_of


@gluon.jit
def put_logits(S: gl.constexpr, memory, step, here, logits, known, state):
    """Store the logits of a row block, where it is `known`; returns the state with what is best of them and of those before,
    and its rows."""
    best, best_row, inverse_temperature, seed_low, seed_high = state
    OUT: gl.constexpr = logits.type.layout
    index = block_index(OUT)
    row, column = index // 16, index % 16
    rows = here * ROWS + row
    inside = known & (rows < S.vocabulary)
    if S.logits_multiplier != 1.0:
        logits *= S.logits_multiplier
    gl.store(memory.activations + S.logits + rows, logits, mask=inside & (column == 0))
    scores = gl.where(gl.abs(logits) < float("inf"), logits, float("inf"))  # so that `Sample` learns of it
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
        memory.constants + S.head.norm.first,
        S.head,
    )
    block, blocks, slot = step.record.a, step.record.b, step.record.c
    LAYOUT: gl.constexpr = result_layout(S.head, gl.num_warps())
    best = gl.full([ROWS, MMA_COLUMNS], float("-inf"), gl.float32, LAYOUT)
    best_row = gl.full([ROWS, MMA_COLUMNS], 0, gl.int32, LAYOUT)
    state = (best, best_row) + load_sampling(memory)
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
