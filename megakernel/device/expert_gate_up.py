"""Device side of `instructions.expert_gate_up`: norm + gate/up + SwiGLU of a chosen expert, times its weight."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.gate_up import swiglu
from megakernel.device.matvec import ROWS, block_index, halves, layer_constants, row_block, stage_norm
from megakernel.device.values import complete, look, put_once, rows_of

EARLY = gl.constexpr(0)  # the choice comes long after the norm's input: none looks for that before


@gluon.jit
def expert_gate_up(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks`, counted over all slots, of the chosen experts' gate/up matrices; of a block's
    rows 0 to 7 are gates, 8 to 15 their ups."""
    UNITS: gl.constexpr = ROWS // 2
    layer = step.record.layer
    stage_norm(
        S,
        memory,
        ring,
        step,
        rows_of(S, memory, step, S.x_mid, layer),
        S.x_mid,
        layer_constants(memory, S.expert_gate_up.norm, layer),
        S.expert_gate_up,
        EARLY,
    )
    index, index_high = halves(block_index(S))
    row, column = index // 16, index % 16
    block, blocks = step.record.a, step.record.b
    slot, first = block // S.experts.blocks, block % S.experts.blocks
    share = rows_of(S, memory, step, S.choice, layer) + S.experts.chosen + slot + 0 * row
    weight = complete(memory, step, look(share, row >= 0), share, row >= 0)
    target = rows_of(S, memory, step, S.expert_mlp, layer) + slot * S.expert_down.columns
    for i in range(blocks):
        gate, up = halves(row_block(S, ring, step, step.use + i * S.expert_gate_up.pages, S.expert_gate_up))
        unit = (first + i) * UNITS + row
        out = swiglu(gate, up) * weight
        put_once(S, step, target + unit, out, (unit < S.expert_down.columns) & (column == 0))
