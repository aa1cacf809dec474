"""Device side of `instructions.o_proj`: x_mid[layer] = x[layer] + (W_o round(attn[layer]) + b) * m."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.projection import projection
from megakernel.device.sync import ALL
from megakernel.device.values import rows_of


@gluon.jit
def o_proj(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the layer's output projection."""
    layer = step.record.layer
    source, residual = rows_of(S, memory, step, S.attn, layer), rows_of(S, memory, step, S.x, layer)
    target = rows_of(S, memory, step, S.x_mid, layer)
    projection(S, memory, ring, step, source, S.o.columns, residual, S.x, target, S.x_mid, S.o, ALL)
