"""Device side of `instructions.embed`: gather one embedding row from the tape, 128 bytes a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.columns.places import in_column, position_of, tokens_of
from megakernel.device.formats.plain import TILE
from megakernel.device.matvec import PAGE_COLUMNS, PAGE_ELEMENTS, ROWS, power_of_two, vector_layout
from megakernel.device.sync import wait_all
from megakernel.device.values import put, rows_of


@gluon.jit
def embed(S: gl.constexpr, memory, ring, step):
    """x[0] = E[token] * embedding_multiplier of every column; the id is clamped because after an expired wait it may be
    anything."""
    SIZE: gl.constexpr = power_of_two(S.embedding.stride) * PAGE_COLUMNS
    wait_all(S, memory, step)
    for column in gl.static_range(S.columns):
        position = position_of(S, memory, step, column)
        tokens = memory.tokens if S.sequences == 1 else tokens_of(S, memory, column // S.depth)
        embed_column(S, memory, step, tokens + position, column, SIZE)


@gluon.jit
def embed_column(S: gl.constexpr, memory, step, place, column: gl.constexpr, SIZE: gl.constexpr):
    """The row of the token at a place, for one column."""
    token = gl.load(place, cache_modifier=".cg")
    token = gl.minimum(gl.maximum(token, 0), S.vocabulary - 1)
    block = token // ROWS
    first = (S.embedding.first + block * S.embedding.stride).to(gl.int64) * PAGE_ELEMENTS + (token % ROWS) * TILE
    index = gl.arange(0, SIZE, vector_layout())
    inside = index < S.hidden
    row = gl.load(memory.weights + first + (index // TILE) * (ROWS * TILE) + index % TILE, mask=inside, other=0.0)
    values = row.to(gl.float32)
    if S.embedding_multiplier != 1.0:
        values *= S.embedding_multiplier
    put(S, step, in_column(S, rows_of(S, memory, step, S.x, 0) + index, column, S.x.column), values, inside)
