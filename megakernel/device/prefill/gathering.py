"""A token's row to each of its experts, and what they make of it back to the token.

`read_rows` norms the residual stream as decode does and copies it to the places that `megakernel.device.prefill.routing` has
found; `read_sum` adds what the experts' products left there, slot after slot, to the residual stream.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.numbers import power_of_two
from megakernel.device.prefill.embedding import ROW, keep_row
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import read_chunk


@gluon.jit(do_not_specialize=["norm"])
def read_rows(chunk, residual, squares, constants, places, shares, rows, row_shares, norm, S: gl.constexpr, T: gl.constexpr):
    """rows bf16 [chunk * k, T.normed], the norm of the residual stream with the weights that begin at `norm` in the constants;
    row_shares fp32 [chunk * k], the share of the softmax that a row's expert has."""
    CHOSEN: gl.constexpr = S.experts.chosen
    let_next_start()
    chunk = read_chunk(chunk)
    column = gl.arange(0, power_of_two(S.hidden), ROW)
    inside = column < S.hidden
    weight = gl.load(constants + norm + column, mask=inside, other=0.0)
    sums = gl.arange(0, T.squares, ROW)
    wait_for_previous()
    for row in range(gl.program_id(0), chunk.count, gl.num_programs(0)):
        x = gl.load(residual + row * S.hidden + column, mask=inside, other=0.0)
        square = gl.sum(gl.load(squares + row * T.squares + sums), axis=0)
        normed = (x * gl.rsqrt(square / S.hidden + S.epsilon) * weight).to(gl.bfloat16)
        for slot in range(CHOSEN):
            place = gl.load(places + row * CHOSEN + slot)
            gl.store(row_shares + place, gl.load(shares + row * CHOSEN + slot))
            gl.store(rows + place.to(gl.int64) * T.normed + column, normed, mask=inside)


@gluon.jit
def slot_row(S: gl.constexpr, T: gl.constexpr, outputs, places, row, slot, column):
    """What a slot's expert made of a token; of the slots that there are the last for one beyond."""
    CHOSEN: gl.constexpr = S.experts.chosen
    place = gl.load(places + row * CHOSEN + gl.minimum(slot, CHOSEN - 1))
    return gl.load(outputs + place.to(gl.int64) * T.normed + column, mask=column < S.hidden, other=0.0)


@gluon.jit(do_not_specialize=["norm"])
def read_sum(chunk, outputs, places, constants, residual, normed, squares, norm, S: gl.constexpr, T: gl.constexpr):
    """The residual stream plus outputs, bf16 [chunk * k, T.normed], and the next product's input, whose norm's weights begin at
    `norm` in the constants.  One slot's row is loaded while the one before is added."""
    let_next_start()
    chunk = read_chunk(chunk)
    column = gl.arange(0, power_of_two(S.hidden), ROW)
    inside = column < S.hidden
    weight = gl.load(constants + norm + column, mask=inside, other=0.0)
    wait_for_previous()
    for row in range(gl.program_id(0), chunk.count, gl.num_programs(0)):
        x = gl.load(residual + row * S.hidden + column, mask=inside, other=0.0)
        found = slot_row(S, T, outputs, places, row, 0, column)
        total = gl.zeros_like(x)
        for slot in range(S.experts.chosen):
            following = slot_row(S, T, outputs, places, row, slot + 1, column)
            total += found.to(gl.float32)
            found = following
        if S.residual_multiplier != 1.0:
            total *= S.residual_multiplier
        keep_row(S, T, residual, normed, squares, row, column, x + total, weight)
