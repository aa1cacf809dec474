"""Device side of `instructions.embed`: gather one embedding row from the tape, 128 bytes a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.plain import TILE
from megakernel.device.matvec import PAGE_COLUMNS, PAGE_ELEMENTS, ROWS, power_of_two, vector_layout
from megakernel.device.sync import wait_all
from megakernel.device.values import put, rows_of


@gluon.jit
def embed(S: gl.constexpr, memory, ring, step):
    """x[0] = E[token] * embedding_multiplier; the id is clamped because after an expired wait it may be anything."""
    SIZE: gl.constexpr = power_of_two(S.embedding.stride) * PAGE_COLUMNS
    wait_all(S, memory, step)
    token = gl.load(memory.tokens + step.position, cache_modifier=".cg")
    token = gl.minimum(gl.maximum(token, 0), S.vocabulary - 1)
    block = token // ROWS
    first = (S.embedding.first + block * S.embedding.stride).to(gl.int64) * PAGE_ELEMENTS + (token % ROWS) * TILE
    column = gl.arange(0, SIZE, vector_layout())
    inside = column < S.hidden
    row = gl.load(memory.weights + first + (column // TILE) * (ROWS * TILE) + column % TILE, mask=inside, other=0.0)
    values = row.to(gl.float32)
    if S.embedding_multiplier != 1.0:
        values *= S.embedding_multiplier
    put(S, step, rows_of(S, memory, step, S.x, 0) + column, values, inside)
