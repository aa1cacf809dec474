"""Projection + residual, for a run of row blocks: what the output and the down projection have in common."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import ROWS, block_index, row_block, stage
from megakernel.device.sync import wait_all


@gluon.jit
def projection(
    S: gl.constexpr,
    memory,
    ring,
    step,
    source,
    residual,
    target,
    bias,
    COUNT: gl.constexpr,
    PAGES: gl.constexpr,
    BIAS: gl.constexpr,
):
    """target[rows] = residual[rows] + W[rows] round(source) + bias[rows], for row blocks a to a + b."""
    wait_all(S, memory, step)
    stage(ring, source, COUNT, PAGES)
    index = block_index()
    row, column = index // 16, index % 16
    for i in range(step.record.b):
        rows = (step.record.a + i) * ROWS + row
        inside = rows < S.hidden
        y = gl.load(residual + rows, mask=inside, other=0.0, cache_modifier=".cg")
        if BIAS >= 0:
            y += gl.load(bias + rows, mask=inside, other=0.0)
        y += row_block(S, ring, step, step.use + i * PAGES, PAGES)
        gl.store(target + rows, y, mask=inside & (column == 0))
