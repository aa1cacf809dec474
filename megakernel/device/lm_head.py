"""Device side of `instructions.lm_head`: norm + LM head, and the best score of the run."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import ROWS, block_index, row_block, stage_norm
from megakernel.device.sampling import best_of, load_sampling, score
from megakernel.device.values import rows_of


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
    inverse_temperature, seed_low, seed_high = load_sampling(memory)
    index = block_index()
    row, column = index // 16, index % 16
    best = gl.full([16, 8], float("-inf"), gl.float32, index.type.layout)
    best_row = gl.full([16, 8], 0, gl.int32, index.type.layout)
    block, blocks, slot = step.record.a, step.record.b, step.record.c
    for i in range(blocks):
        rows = (block + i) * ROWS + row
        inside = rows < S.vocabulary
        logits = row_block(S, ring, step, step.use + i * S.head.pages, S.head)
        if S.logits_multiplier != 1.0:
            logits *= S.logits_multiplier
        gl.store(memory.activations + S.logits + rows, logits, mask=inside & (column == 0))
        scores = gl.where(gl.abs(logits) < float("inf"), logits, float("inf"))  # so that `Sample` learns of it
        if inverse_temperature > 0.0:
            scores = score(scores, rows, step.position, inverse_temperature, seed_low, seed_high)
        better = inside & (scores > best)
        best = gl.where(better, scores, best)
        best_row = gl.where(better, rows, best_row)
    top, top_row = best_of(gl.max(best, axis=1), gl.max(gl.where(best == gl.max(best, axis=1)[:, None], best_row, 0), axis=1))
    target = memory.activations + S.best + slot * 2
    gl.store(target, top)
    gl.store(target + 1, top_row.to(gl.float32))
