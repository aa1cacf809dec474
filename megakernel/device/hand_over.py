"""Device side of `instructions.hand_over`: the residual stream that prefill left becomes that of the program's first layer."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import PAGE_COLUMNS, vector_layout
from megakernel.device.numbers import power_of_two
from megakernel.device.sync import wait_all
from megakernel.device.values import put, rows_of


@gluon.jit
def hand_over(S: gl.constexpr, memory, ring, step):
    """x[first layer] = hidden."""
    SIZE: gl.constexpr = power_of_two(S.embedding.stride) * PAGE_COLUMNS
    wait_all(S, memory, step)
    column = gl.arange(0, SIZE, vector_layout())
    inside = column < S.hidden
    hidden = gl.load(memory.hidden + column, mask=inside, other=0.0, cache_modifier=".cg")
    put(S, step, rows_of(S, memory, step, S.x, step.record.layer) + column, hidden, inside)
