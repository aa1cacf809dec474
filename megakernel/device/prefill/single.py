"""A product that is left as it is, fp32: the scores of a layer's router, and queries and keys that must be normed together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.pieces import PIECE, by_lines, later_rows, line_columns, line_rows, make_rooms, piece_of
from megakernel.device.prefill.product import (
    BLOCK,
    ROWS,
    Work,
    item_at,
    item_count,
    load_operands,
    make_operands,
    read_chunk,
)
from megakernel.device.prefill.projections import (
    CONSUMER_REGISTERS,
    LOADER_REGISTERS,
    norm_scale,
    scaled,
    tile_product,
    token_squares,
)

# Numbers on which nothing is specialised.
ARGUMENTS = ["layer", "columns", "steps", "split"]


@gluon.jit
def keep_single(T: gl.constexpr, out, room, chunk, item, scale, acc, WHO: gl.constexpr):
    """Store a tile as it is, but for its norm."""
    WIDTH: gl.constexpr = T.blocks * BLOCK
    for i in gl.static_range(T.tile // PIECE):
        values = by_lines(room, scaled(piece_of(acc, i * PIECE, PIECE), scale))
        row = item.row * T.tokens + WHO * ROWS + line_rows()
        column = item.column * T.tile + i * PIECE + line_columns()
        there = (row + later_rows() < chunk.count) & (column < WIDTH)
        gl.store(out + (row * WIDTH + column) + later_rows() * WIDTH, values, mask=there)


@gluon.jit
def consume_single(S: gl.constexpr, T: gl.constexpr, work, chunk, operands, rooms, squares, out, WHO: gl.constexpr):
    """Consumer `WHO`: its tokens of all of this SM's items."""
    use = 0
    for index in range(gl.program_id(0), item_count(T, work, chunk), gl.num_programs(0)):
        item = item_at(T, work, chunk, index)
        ahead = token_squares(T, squares, chunk, item, WHO)
        acc, whole, use = tile_product(T, work, chunk, operands, use, item, WHO)
        if whole:
            keep_single(T, out, rooms.index(WHO), chunk, item, norm_scale(S, ahead), acc, WHO)


@gluon.jit(do_not_specialize=ARGUMENTS)
def read_single(
    x, w, chunk, tiles, parts, arrivals, squares, out, layer, columns, steps, split, S: gl.constexpr, T: gl.constexpr
):
    """One matrix of a layer whose input is normed, for all tokens of a chunk, as `read_product` takes it: out fp32 [chunk,
    packed rows of the matrix], without its bias."""
    let_next_start()
    chunk = read_chunk(chunk)
    work = Work(layer, layer, tiles, columns, steps, split, parts, arrivals)
    operands, rooms = make_operands(T, x, w), make_rooms(T.consumers)
    wait_for_previous()
    if T.consumers == 2:
        gl.warp_specialize(
            [
                (consume_single, (S, T, work, chunk, operands, rooms, squares, out, 0)),
                (consume_single, (S, T, work, chunk, operands, rooms, squares, out, 1)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume_single, (S, T, work, chunk, operands, rooms, squares, out, 0)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
