"""Device side of `instructions.gate_up`: norm + gate/up + SwiGLU."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import FEW, ROWS, block_index, halves, layer_constants, row_block, stage_norm, two_row_blocks
from megakernel.device.values import put_once, rows_of


@gluon.jit
def swiglu(gate, up):
    """SiLU of the gates times the ups."""
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def put_units(S: gl.constexpr, memory, step, here, y, row, column):
    """Store the activations of a row block, of whose products rows 0 to 7 are gates, 8 to 15 their ups."""
    UNITS: gl.constexpr = ROWS // 2
    gate, up = halves(y)
    if S.gate_up.bias.first >= 0:
        bias = layer_constants(memory, S.gate_up.bias, step.record.layer) + here * ROWS + row
        gate += gl.load(bias)
        up += gl.load(bias + UNITS)
    unit = here * UNITS + row
    target = rows_of(S, memory, step, S.mlp, step.record.layer)
    put_once(S, step, target + unit, swiglu(gate, up), (unit < S.down.columns) & (column == 0))


@gluon.jit
def gate_up(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the layer's gate/up matrix; of a block's rows 0 to 7 are gates, 8 to 15 their
    ups."""
    PAGES: gl.constexpr = S.gate_up.pages
    layer = step.record.layer
    stage_norm(
        S,
        memory,
        ring,
        step,
        rows_of(S, memory, step, S.x_mid, layer),
        layer_constants(memory, S.gate_up.norm, layer),
        S.gate_up,
    )
    index, index_high = halves(block_index())
    row, column = index // 16, index % 16
    block, blocks = step.record.a, step.record.b
    alone = 0
    if PAGES <= FEW:
        alone = blocks // 2 * 2
        for i in range(0, alone, 2):
            first, second = two_row_blocks(S, ring, step, step.use + i * PAGES, S.gate_up)
            put_units(S, memory, step, block + i, first, row, column)
            put_units(S, memory, step, block + i + 1, second, row, column)
    for i in range(alone, blocks):
        put_units(S, memory, step, block + i, row_block(S, ring, step, step.use + i * PAGES, S.gate_up), row, column)
