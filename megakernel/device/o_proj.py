"""Device side of `instructions.o_proj`: x_mid[layer] = x[layer] + (W_o round(attn[layer]) + b) * m."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.projection import projection
from megakernel.device.sync import ALL
from megakernel.device.values import values_of


@gluon.jit
def o_proj(S: gl.constexpr, memory, ring, step):
    """Row blocks a to a + b of the layer's output projection."""
    values = values_of(S, memory, step)
    projection(
        S,
        memory,
        ring,
        step,
        values + S.attn + step.record.layer * S.attn_stride,
        values + S.x + step.record.layer * S.x_stride,
        values + S.x_mid + step.record.layer * S.x_mid_stride,
        memory.constants + S.o_bias + step.record.layer * S.bias_stride,
        S.attention_columns,
        S.attention_pages,
        S.o_bias,
        ALL,
    )
