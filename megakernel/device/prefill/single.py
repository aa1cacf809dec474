"""A product that is left as it is, fp32: the scores of a layer's router, and queries and keys that must be normed together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import (
    BLOCK,
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
    PIECE,
    column_halves,
    norm_scale,
    scaled,
    tile_product,
    token_rows,
)

# Numbers on which nothing is specialised.
ARGUMENTS = ["layer", "columns", "steps", "split"]


@gluon.jit
def keep_single(T: gl.constexpr, out, chunk, item, scale, acc, first: gl.constexpr, WHO: gl.constexpr):
    """`acc` are the tile's columns from `first` on."""
    if acc.shape[1] > PIECE:
        left, right = column_halves(acc)
        keep_single(T, out, chunk, item, scale, left, first, WHO)
        keep_single(T, out, chunk, item, scale, right, first + acc.shape[1] // 2, WHO)
    else:
        WIDTH: gl.constexpr = T.blocks * BLOCK
        rows = token_rows(T, item, WHO, gl.SliceLayout(1, acc.type.layout))
        columns = item.column * T.tile + first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        known = (rows < chunk.count)[:, None] & (columns < WIDTH)[None, :]
        gl.store(out + rows[:, None] * WIDTH + columns[None, :], scaled(acc, scale), mask=known)


@gluon.jit
def consume_single(S: gl.constexpr, T: gl.constexpr, work, chunk, operands, squares, out, WHO: gl.constexpr):
    """Consumer `WHO`: its tokens of all of this SM's items."""
    use = 0
    for index in range(gl.program_id(0), item_count(T, work, chunk), gl.num_programs(0)):
        item = item_at(T, work, chunk, index)
        acc, whole, use = tile_product(T, work, chunk, operands, use, item, WHO)
        if whole:
            keep_single(T, out, chunk, item, norm_scale(S, T, squares, chunk, item, WHO), acc, 0, WHO)


@gluon.jit(do_not_specialize=ARGUMENTS)
def read_single(
    x, w, chunk, tiles, parts, arrivals, squares, out, layer, columns, steps, split, S: gl.constexpr, T: gl.constexpr
):
    """One matrix of a layer whose input is normed, for all tokens of a chunk, as `read_product` takes it: out fp32 [chunk,
    packed rows of the matrix], without its bias."""
    let_next_start()
    chunk = read_chunk(chunk)
    work = Work(layer, layer, tiles, columns, steps, split, parts, arrivals)
    operands = make_operands(T, x, w)
    wait_for_previous()
    if T.consumers == 2:
        gl.warp_specialize(
            [
                (consume_single, (S, T, work, chunk, operands, squares, out, 0)),
                (consume_single, (S, T, work, chunk, operands, squares, out, 1)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume_single, (S, T, work, chunk, operands, squares, out, 0)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
