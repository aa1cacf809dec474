"""Device side of `instructions.gate_up`: norm + gate/up + SwiGLU."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import ROWS, block_index, halves, row_block, stage_norm
from megakernel.device.values import put_once, values_of


@gluon.jit
def swiglu(gate, up):
    """SiLU of the gates times the ups."""
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def gate_up(S: gl.constexpr, memory, ring, step):
    """Row blocks a to a + b of the layer's gate/up matrix; rows 0 to 7 of a block are gates, 8 to 15 their ups."""
    UNITS: gl.constexpr = ROWS // 2
    layer = step.record.layer
    stage_norm(
        S,
        memory,
        ring,
        step,
        values_of(S, memory, step) + S.x_mid + layer * S.x_mid_stride,
        memory.constants + S.mlp_norm + layer * S.norm_stride,
        S.hidden,
        S.epsilon,
    )
    index, index_high = halves(block_index())
    row, column = index // 16, index % 16
    target = values_of(S, memory, step) + S.mlp + layer * S.mlp_stride
    for i in range(step.record.b):
        gate, up = halves(row_block(S, ring, step, step.use + i * S.hidden_pages, S.hidden_pages))
        if S.gate_up_bias >= 0:
            bias = memory.constants + S.gate_up_bias + layer * S.bias_stride + (step.record.a + i) * ROWS + row
            gate += gl.load(bias)
            up += gl.load(bias + UNITS)
        unit = (step.record.a + i) * UNITS + row
        out = swiglu(gate, up)
        put_once(S, step, target + unit, out, (unit < S.intermediate) & (column == 0))
