"""The product of a quantised matrix that has been widened, while the same matrix of the next layer is widened."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.pieces import make_rooms
from megakernel.device.prefill.product import Work, load_operands, make_operands, read_chunk
from megakernel.device.prefill.projections import ARGUMENTS as PRODUCTS_ARGUMENTS
from megakernel.device.prefill.projections import LOADER_REGISTERS, Activations, Model, consume
from megakernel.device.prefill.widening import ARGUMENTS as WIDENINGS_ARGUMENTS
from megakernel.device.prefill.widening import make_source, widen

WARPS = gl.constexpr(2)  # that widen; they share a warp group, and its registers, with the loader
WIDENER_REGISTERS = gl.constexpr(64)  # beside two consumers,
CONSUMER_REGISTERS = gl.constexpr(224)  # of which one has so many and the other nearly so many,
ROOMY_REGISTERS = gl.constexpr(128)  # and beside one


@gluon.jit(do_not_specialize=PRODUCTS_ARGUMENTS + WIDENINGS_ARGUMENTS)
def read_widened(
    x,
    w,
    chunk,
    tiles,
    parts,
    arrivals,
    residual,
    normed,
    squares,
    queries,
    units,
    constants,
    rope,
    cache,
    tape,
    widened,
    layer,
    place,
    columns,
    steps,
    split,
    head_pages,
    bias,
    norm,
    first_page,
    scales,
    pages,
    S: gl.constexpr,
    T: gl.constexpr,
    W: gl.constexpr,
):
    """`megakernel.device.prefill.projections.read_product` and `megakernel.device.prefill.widening.widen_matrix` in one: of one
    layer and, no pages after the last, of the next."""
    let_next_start()
    chunk = read_chunk(chunk)
    work = Work(layer, place, tiles, columns, steps, split, parts, arrivals)
    at = Activations(residual, normed, squares, queries, units)
    model = Model(constants, rope, cache, head_pages)
    source = make_source(tape, constants, widened, first_page, scales)
    operands, rooms = make_operands(T, x, w), make_rooms(T.consumers)
    wait_for_previous()
    if T.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (S, T, model, at, work, chunk, operands, rooms, bias, norm, 0)),
                (consume, (S, T, model, at, work, chunk, operands, rooms, bias, norm, 1)),
                (widen, (W, source, pages, WARPS)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [4, WARPS, 1],
            [CONSUMER_REGISTERS, WIDENER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (S, T, model, at, work, chunk, operands, rooms, bias, norm, 0)),
                (widen, (W, source, pages, WARPS)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [WARPS, 1],
            [ROOMY_REGISTERS, LOADER_REGISTERS],
        )
