"""Device side of `instructions.router`: norm + router of a mixture of experts."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import ROWS, block_index, layer_constants, row_block, stage_norm
from megakernel.device.values import put_once, rows_of


@gluon.jit
def router(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the layer's router."""
    layer = step.record.layer
    stage_norm(
        S,
        memory,
        ring,
        step,
        rows_of(S, memory, step, S.x_mid, layer),
        S.x_mid,
        layer_constants(memory, S.router.norm, layer),
        S.router,
    )
    index = block_index(S)
    row, column = index // 16, index % 16
    target = rows_of(S, memory, step, S.scores, layer)
    block, blocks = step.record.a, step.record.b
    for i in range(blocks):
        rows = (block + i) * ROWS + row
        scores = row_block(S, ring, step, step.use + i * S.router.pages, S.router)
        put_once(S, step, target + rows, scores, (rows < S.experts.total) & (column == 0))
