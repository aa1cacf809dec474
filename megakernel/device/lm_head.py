"""Device side of `instructions.lm_head`: norm + LM head, and the best score of the run."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import FEW, ROWS, block_index, row_block, stage_norm, two_row_blocks
from megakernel.device.sampling import best_of, load_sampling, score
from megakernel.device.values import rows_of


@gluon.jit
def put_logits(S: gl.constexpr, memory, step, here, logits, row, column, sampling, best, best_row):
    """Store the logits of a row block; returns what is best of them and of those before, and its rows."""
    inverse_temperature, seed_low, seed_high = sampling
    rows = here * ROWS + row
    inside = rows < S.vocabulary
    if S.logits_multiplier != 1.0:
        logits *= S.logits_multiplier
    gl.store(memory.activations + S.logits + rows, logits, mask=inside & (column == 0))
    scores = gl.where(gl.abs(logits) < float("inf"), logits, float("inf"))  # so that `Sample` learns of it
    if inverse_temperature > 0.0:
        scores = score(scores, rows, step.position, inverse_temperature, seed_low, seed_high)
    better = inside & (scores > best)
    return gl.where(better, scores, best), gl.where(better, rows, best_row)


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
    PAGES: gl.constexpr = S.head.pages
    sampling = load_sampling(memory)
    index = block_index()
    row, column = index // 16, index % 16
    best = gl.full([16, 8], float("-inf"), gl.float32, index.type.layout)
    best_row = gl.full([16, 8], 0, gl.int32, index.type.layout)
    block, blocks, slot = step.record.a, step.record.b, step.record.c
    alone = 0
    if PAGES <= FEW:
        alone = blocks // 2 * 2
        for i in range(0, alone, 2):
            first, second = two_row_blocks(S, ring, step, step.use + i * PAGES, S.head)
            best, best_row = put_logits(S, memory, step, block + i, first, row, column, sampling, best, best_row)
            best, best_row = put_logits(S, memory, step, block + i + 1, second, row, column, sampling, best, best_row)
    for i in range(alone, blocks):
        logits = row_block(S, ring, step, step.use + i * PAGES, S.head)
        best, best_row = put_logits(S, memory, step, block + i, logits, row, column, sampling, best, best_row)
    top, top_row = best_of(gl.max(best, axis=1), gl.max(gl.where(best == gl.max(best, axis=1)[:, None], best_row, 0), axis=1))
    target = memory.activations + S.best + slot * 2
    gl.store(target, top)
    gl.store(target + 1, top_row.to(gl.float32))
