"""Device side of `instructions.gate_up`: norm + gate/up + SwiGLU."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.columns.operand import put_rows
from megakernel.device.matvec import ROWS, block_index, halves, layer_constants, row_block, stage_norm
from megakernel.device.stream import each_row_block, streams
from megakernel.device.values import put_once, rows_of


@gluon.jit
def swiglu(gate, up):
    """SiLU of the gates times the ups."""
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def put_units(S: gl.constexpr, memory, step, here, y, known, state):
    """Store the activations of a row block, where it is `known`, of whose products rows 0 to 7 are gates, 8 to 15 their ups."""
    UNITS: gl.constexpr = ROWS // 2
    gate, up = halves(y)
    index, index_high = halves(block_index(S))
    row, column = index // 16, index % 16
    if S.gate_up.bias.first >= 0:
        bias = layer_constants(memory, S.gate_up.bias, step.record.layer) + here * ROWS + row
        gate += gl.load(bias)
        up += gl.load(bias + UNITS)
    target = rows_of(S, memory, step, S.mlp, step.record.layer)
    if S.columns == 1:
        unit = here * UNITS + row
        put_once(S, step, target + unit, swiglu(gate, up), known & (unit < S.down.columns) & (column == 0))
    else:
        put_rows(S, step, target, S.mlp.column, here * UNITS, S.down, swiglu(gate, up), known)
    return state


@gluon.jit
def gate_up(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the layer's gate/up matrix; of a block's rows 0 to 7 are gates, 8 to 15 their
    ups."""
    layer = step.record.layer
    stage_norm(
        S,
        memory,
        ring,
        step,
        rows_of(S, memory, step, S.x_mid, layer),
        S.x_mid,
        layer_constants(memory, S.gate_up.norm, layer),
        S.gate_up,
    )
    block, blocks = step.record.a, step.record.b
    if streams(S.gate_up):
        each_row_block(S, memory, ring, step, block, blocks, S.gate_up, put_units, ())
    else:
        for i in range(blocks):
            y = row_block(S, ring, step, step.use + i * S.gate_up.pages, S.gate_up)
            put_units(S, memory, step, block + i, y, True, ())
