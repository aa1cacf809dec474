"""Device side of `instructions.embed`: gather one embedding row from the tape, 128 bytes a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.columns.places import in_column, position_of, sequence_of, tokens_of
from megakernel.device.columns.staging import HELD, norm_layout
from megakernel.device.formats.layouts import MMA_COLUMNS
from megakernel.device.formats.plain import TILE
from megakernel.device.matvec import PAGE_COLUMNS, PAGE_ELEMENTS, ROWS, vector_layout
from megakernel.device.numbers import power_of_two
from megakernel.device.sync import wait_all
from megakernel.device.values import put_fours, rows_of


@gluon.jit
def embed(S: gl.constexpr, memory, ring, step):
    """x[0] = E[token] * embedding_multiplier of every column; the id is clamped because after an expired wait it may be
    anything."""
    SIZE: gl.constexpr = power_of_two(S.embedding.stride) * PAGE_COLUMNS
    wait_all(S, memory, step)
    if S.columns == 1:
        index = gl.arange(0, SIZE, vector_layout())
        embed_rows(S, memory, step, row_of(S, memory.tokens + step.position), index, index < S.hidden, 0)
    else:
        L: gl.constexpr = norm_layout()
        PART: gl.constexpr = min(SIZE, HELD // MMA_COLUMNS)
        # A column a thread: what stands where another says is loaded for all of them at once.
        every = gl.arange(0, MMA_COLUMNS, gl.BlockedLayout([1], [32], [4], [0]))
        tokens = tokens_of(S, memory, sequence_of(S, every))
        first = row_of(S, tokens + position_of(S, memory, step, every))
        first = gl.convert_layout(first, gl.SliceLayout(1, L))[:, None]
        column = gl.arange(0, MMA_COLUMNS, gl.SliceLayout(1, L))
        for part in gl.static_range(SIZE // PART):
            index = (part * PART + gl.arange(0, PART, gl.SliceLayout(0, L)))[None, :]
            embed_rows(S, memory, step, first, index, (index < S.hidden) & (column < S.columns)[:, None], column[:, None])


@gluon.jit
def row_of(S: gl.constexpr, place):
    """Where the row of the token at a place begins in the tape."""
    token = gl.load(place, cache_modifier=".cg")
    token = gl.minimum(gl.maximum(token, 0), S.vocabulary - 1)
    block = token // ROWS
    return (S.embedding.first + block * S.embedding.stride).to(gl.int64) * PAGE_ELEMENTS + (token % ROWS) * TILE


@gluon.jit
def embed_rows(S: gl.constexpr, memory, step, first, index, inside, column):
    """The values `index` of the rows that begin at `first`, to x of their columns; a thread's four lie side by side."""
    row = gl.load(memory.weights + first + (index // TILE) * (ROWS * TILE) + index % TILE, mask=inside, other=0.0)
    values = row.to(gl.float32)
    if S.embedding_multiplier != 1.0:
        values *= S.embedding_multiplier
    put_fours(S, step, in_column(S, rows_of(S, memory, step, S.x, 0) + index, column, S.x.column), values, inside)
