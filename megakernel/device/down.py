"""Device side of `instructions.down`: x[layer + 1] = x_mid[layer] + (W_down round(mlp[layer]) + b) * m."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.projection import projection
from megakernel.device.values import rows_of

EARLY = gl.constexpr(16)  # signals before the last when the first part of the input is looked for


@gluon.jit
def down(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the layer's down projection."""
    layer = step.record.layer
    source, residual = rows_of(S, memory, step, S.mlp, layer), rows_of(S, memory, step, S.x_mid, layer)
    target = rows_of(S, memory, step, S.x, layer + 1)
    projection(S, memory, ring, step, source, S.mlp.column, residual, S.x_mid, target, S.x, S.down, EARLY)
