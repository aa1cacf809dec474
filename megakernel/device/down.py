"""Device side of `instructions.down`: x[layer + 1] = x_mid[layer] + (W_down round(mlp[layer]) + b) * m."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.projection import projection
from megakernel.device.values import values_of

EARLY = gl.constexpr(16)  # signals before the last when the first part of the input is looked for


@gluon.jit
def down(S: gl.constexpr, memory, ring, step):
    """Row blocks a to a + b of the layer's down projection."""
    values = values_of(S, memory, step)
    projection(
        S,
        memory,
        ring,
        step,
        values + S.mlp + step.record.layer * S.mlp_stride,
        values + S.x_mid + step.record.layer * S.x_mid_stride,
        values + S.x + (step.record.layer + 1) * S.x_stride,
        memory.constants + S.down_bias + step.record.layer * S.bias_stride,
        S.intermediate,
        S.intermediate_pages,
        S.down_bias,
        EARLY,
    )
