"""The chunk's tokens as rows of the embedding: the residual stream before the first layer, and that layer's input."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.plain import TILE
from megakernel.device.matvec import PAGE_COLUMNS, PAGE_ELEMENTS, ROWS
from megakernel.device.numbers import power_of_two
from megakernel.device.prefill.order import let_next_start
from megakernel.device.prefill.product import read_chunk

ROW = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))  # of a token's values


@gluon.jit
def keep_row(S: gl.constexpr, T: gl.constexpr, residual, normed, squares, row, column, x, norm):
    """One token's residual stream, all of it; times a norm's weights as the next product's input; the sum of its squares."""
    inside = column < S.hidden
    places = gl.arange(0, T.squares, ROW)
    gl.store(residual + row * S.hidden + column, x, mask=inside)
    gl.store(normed + row * T.normed + column, (x * norm).to(gl.bfloat16), mask=inside)
    gl.store(squares + row * T.squares + places, gl.where(places == 0, gl.sum(x * x, axis=0), 0.0))


@gluon.jit
def read_embedding(weights, tokens, constants, chunk, residual, normed, squares, S: gl.constexpr, T: gl.constexpr):
    """Token i of the chunk is the business of the i-th program and those a whole grid further."""
    let_next_start()
    chunk = read_chunk(chunk)
    SIZE: gl.constexpr = power_of_two(S.embedding.stride) * PAGE_COLUMNS
    column = gl.arange(0, SIZE, ROW)
    inside = column < S.hidden
    norm = gl.load(constants + S.qkv.norm.first + column, mask=inside, other=0.0)
    for row in range(gl.program_id(0), chunk.count, gl.num_programs(0)):
        token = gl.load(tokens + chunk.start + row)
        token = gl.minimum(gl.maximum(token, 0), S.vocabulary - 1)
        first = (S.embedding.first + token // ROWS * S.embedding.stride).to(gl.int64) * PAGE_ELEMENTS + (token % ROWS) * TILE
        place = first + (column // TILE) * (ROWS * TILE) + column % TILE
        x = gl.load(weights + place, mask=inside, other=0.0).to(gl.float32)
        if S.embedding_multiplier != 1.0:
            x *= S.embedding_multiplier
        keep_row(S, T, residual, normed, squares, row, column, x, norm)
