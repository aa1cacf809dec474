"""Projection + residual, for a run of row blocks: what the output and the down projection have in common."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.columns.places import in_column, kept
from megakernel.device.matvec import ROWS, block_index, layer_constants, multiply_columns, row_block, stage_and_multiply
from megakernel.device.sync import wait_all
from megakernel.device.values import complete, look, put_once


@gluon.jit
def projection(
    S: gl.constexpr,
    memory,
    ring,
    step,
    source,
    distance: gl.constexpr,
    residual,
    before_buffer: gl.constexpr,
    target,
    after_buffer: gl.constexpr,
    matrix: gl.constexpr,
    EARLY: gl.constexpr,
):
    """target[rows] = residual[rows] + (W[rows] round(source) + bias[rows]) * residual_multiplier, for row blocks `block` to
    `block + blocks`.  Columns of the source are `distance` apart, those of the others as their buffers say."""
    bias = layer_constants(memory, matrix.bias, step.record.layer)
    if S.columns == 1:
        wait_all(S, memory, step, EARLY)
    else:
        wait_all(S, memory, step)  # of so many values some would be vacant
    index = block_index(S)
    row, column = index // 16, index % 16
    block, blocks = step.record.a, step.record.b
    for i in range(blocks):
        rows = (block + i) * ROWS + row
        inside = (rows < S.hidden) & kept(S, column)
        place = in_column(S, residual + rows, column, before_buffer.column)
        before = look(place, inside)
        if S.columns > 1:
            y = multiply_columns(S, memory, ring, step, step.use + i * matrix.pages, source, distance, matrix)
        elif i == 0:
            y = stage_and_multiply(S, memory, ring, step, source, matrix)
        else:
            y = row_block(S, ring, step, step.use + i * matrix.pages, matrix)
        if matrix.bias.first >= 0:
            y += gl.load(bias + rows, mask=inside, other=0.0)
        if S.residual_multiplier != 1.0:
            y *= S.residual_multiplier
        y += complete(memory, step, before, place, inside)
        put_once(S, step, in_column(S, target + rows, column, after_buffer.column), y, inside)
