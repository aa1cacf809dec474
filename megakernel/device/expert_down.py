"""Device side of `instructions.expert_down`: x[layer + 1] = x_mid[layer] + m * sum over slots of W_down
expert_mlp[layer][slot]."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.experts import multiply_slots, stage_slots_and_multiply
from megakernel.device.matvec import ROWS, block_index
from megakernel.device.sync import wait_all
from megakernel.device.values import complete, look, put_once, rows_of

EARLY = gl.constexpr(16)  # signals before the last when the first part of the input is looked for


@gluon.jit
def expert_down(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the chosen experts' down projections, all slots in one sum."""
    layer = step.record.layer
    source, residual = rows_of(S, memory, step, S.expert_mlp, layer), rows_of(S, memory, step, S.x_mid, layer)
    target = rows_of(S, memory, step, S.x, layer + 1)
    wait_all(S, memory, step, EARLY)
    index = block_index(S)
    row, column = index // 16, index % 16
    block, blocks = step.record.a, step.record.b
    for i in range(blocks):
        rows = (block + i) * ROWS + row
        inside = (rows < S.hidden) & (column == 0)
        before = look(residual + rows, inside)
        if i == 0:
            y = stage_slots_and_multiply(S, memory, ring, step, source)
        else:
            y = multiply_slots(S, ring, step, step.use + i * S.expert_down.pages)
        if S.residual_multiplier != 1.0:
            y *= S.residual_multiplier
        y += complete(memory, step, before, residual + rows, inside)
        put_once(S, step, target + rows, y, inside)
