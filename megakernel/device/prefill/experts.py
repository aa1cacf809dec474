"""The products of a layer's experts: the rows that `megakernel.device.prefill.gathering` has gathered, each times its expert's
matrix, which is read where it lies on the tape."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.grouped.product import (
    CONSUMER_REGISTERS,
    LOADER_REGISTERS,
    Output,
    consume,
    load_operands,
    make_operands,
)
from megakernel.device.grouped.walk import plan_work
from megakernel.device.prefill.order import let_next_start, wait_for_previous

# Numbers on which nothing is specialised; n, k and the stride are multiples of 16, which stores and loads make use of.
ARGUMENTS = ["groups", "rows", "band"]


@gluon.jit(do_not_specialize=ARGUMENTS)
def read_experts(x, few, w, offsets, shares, y, groups, rows, n, k, stride, band, T: gl.constexpr):
    """`megakernel.device.grouped.product.grouped_kernel` as one of prefill's kernels: w are boxes of row blocks on the tape, y
    has rows of `stride` elements.

    shares: fp32 [rows], what units are multiplied by; not looked at unless T.units.
    """
    let_next_start()
    operands = make_operands(T, x, w)
    wait_for_previous()
    work = plan_work(T, offsets, groups, rows, n, k, band)
    out = Output(y, stride, shares, shares)
    gl.warp_specialize(
        [
            (consume, (T, out, work, operands, 0)),
            (consume, (T, out, work, operands, 1)),
            (load_operands, (T, x, few, w, work, operands)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )
