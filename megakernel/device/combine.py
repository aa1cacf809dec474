"""Device side of `instructions.combine`: the slices of one KV head's query group."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles
from megakernel.device.columns.operand import place_of, words_of
from megakernel.device.matvec import vector_layout
from megakernel.device.numbers import power_of_two
from megakernel.device.sync import ALL, LONG_WAIT, agree, wait_all
from megakernel.device.trace import STAGED, stamp
from megakernel.device.values import look, look_again, partials_of, put, rows_of, vacant

MAXIMA = gl.constexpr(128)  # of slices and columns that a pass holds: 16 slices of 8 columns, as many as there mostly are
FEW = gl.constexpr(8)  # slices for which a shorter pass pays
CHECKED = gl.constexpr(512)  # values that are looked through at a time
TOGETHER_ELEMENTS = gl.constexpr(4096)  # 32 registers of each of the consumer's threads


WIDTH = gl.constexpr(64)  # dimensions that a warp's threads hold once


@gluon.constexpr_function
def head_layout():
    """[heads, dims] of one slice."""
    return gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])


@gluon.constexpr_function
def head_dims(rows):
    """Dimensions of a head of so many rows, padded so that no two threads hold the same.

    A load of 16 bytes a thread reaches the threads of a warp in parts, so two that hold the same value may see it at different
    moments, one vacant and one not.  A reduction asks only one of them, and both would store.
    """
    return max(WIDTH.value, power_of_two(rows))


@gluon.constexpr_function
def slices_together(elements, most):
    """How many slices of so many elements are loaded at a time, in a pass of at most so many; all are powers of two."""
    return max(1, min(most, FEW.value, TOGETHER_ELEMENTS.value // elements))


@gluon.constexpr_function
def slices_a_pass(columns, dims, few):
    """How many slices one pass takes in at most, and where they are few; wide heads leave no registers for two passes."""
    most = max(1, MAXIMA.value // columns)
    return min(FEW.value, most) if few and columns * dims * FEW.value <= TOGETHER_ELEMENTS.value else most


@gluon.jit
def add_chunk(S: gl.constexpr, source, slices, m, total, out, MOST: gl.constexpr):
    """Take in up to MOST slices from `source` on, of which there are `slices`: with them, the largest score, the sum and the
    unnormalised output of each head.  What is vacant makes sum or output NaN.

    Straight-line code, so that all is on its way before the first value is looked at.
    """
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    HEAD: gl.constexpr = head_layout()
    COLUMNS: gl.constexpr = out.shape[0]
    DIMS: gl.constexpr = out.shape[1]
    TOGETHER: gl.constexpr = slices_together(COLUMNS * DIMS, MOST)
    heads = gl.arange(0, COLUMNS, gl.SliceLayout(1, HEAD))
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, HEAD))
    known = heads < S.group
    inside = known[:, None] & (dims[None, :] < S.head_rows)
    place = heads[:, None] * S.head_rows + dims[None, :]
    maxima = ()
    for s in gl.static_range(MOST):
        maxima += (gl.load(source + s * ROWS + heads, mask=known & (s < slices), other=float("-inf"), volatile=True),)
    before = m
    for s in gl.static_range(MOST):
        m = gl.maximum(m, maxima[s])
    decay = gl.exp(before - m)
    total, out = total * decay, out * decay[:, None]
    for first in gl.static_range(0, MOST, TOGETHER):
        parts = ()
        for j in gl.static_range(TOGETHER):
            part = source + (first + j) * ROWS
            here = first + j < slices
            parts += (look(part + S.group + heads, known & here), look(part + 2 * S.group + place, inside & here))
        for j in gl.static_range(TOGETHER):
            weight = gl.exp(maxima[first + j] - m)
            total += weight * parts[2 * j]
            out += weight[:, None] * parts[2 * j + 1]
    return m, total, out


@gluon.jit
def any_vacant(S: gl.constexpr, source, slices):
    """Whether anything of the slices from `source` on is vacant, int32, the same for all threads."""
    index = gl.arange(0, CHECKED, vector_layout())
    absent = gl.zeros([CHECKED], gl.int32, vector_layout())
    count = slices * (S.group * (S.head_rows + 2))
    for first in range(0, count, CHECKED):
        absent |= vacant(look(source + first + index, first + index < count))
    return gl.max(absent, axis=0)


@gluon.jit
def combine(S: gl.constexpr, memory, ring, step):
    """KV head `head` in column `column`."""
    wait_all(S, memory, step, ALL)
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    COLUMNS: gl.constexpr = S.group_columns
    DIMS: gl.constexpr = head_dims(S.head_rows)
    HEAD: gl.constexpr = head_layout()
    CHUNK: gl.constexpr = slices_a_pass(COLUMNS, DIMS, False)
    FEWEST: gl.constexpr = slices_a_pass(COLUMNS, DIMS, True)
    head, column = step.record.a, step.record.b
    slices = memory.bucket.slices
    source = partials_of(S, memory, step) + head * (slices * ROWS)
    if S.columns > 1:
        source += column * (S.kv_heads * slices * ROWS)
    out = gl.zeros([COLUMNS, DIMS], gl.float32, HEAD)
    total = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(1, HEAD))
    heads = gl.arange(0, COLUMNS, gl.SliceLayout(1, HEAD))[:, None]
    begin, waiting, sure = cycles(), 1, 0
    while waiting != 0:
        m = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(1, HEAD))
        total = gl.zeros([COLUMNS], gl.float32, gl.SliceLayout(1, HEAD))
        out = gl.zeros([COLUMNS, DIMS], gl.float32, HEAD)
        for first in range(0, slices, CHUNK):
            here, left = source + first * ROWS, slices - first
            if FEWEST == CHUNK:
                m, total, out = add_chunk(S, here, left, m, total, out, CHUNK)
            elif left <= FEWEST:
                m, total, out = add_chunk(S, here, left, m, total, out, FEWEST)
            else:
                m, total, out = add_chunk(S, here, left, m, total, out, CHUNK)
        found = out + total[:, None]
        waiting = (1 - sure) * look_again(memory, step, begin, ((heads < S.group) & (found != found)).to(gl.int32))
        if waiting != 0:  # for long only where NaN is the very value: then all of it is there
            if agree((cycles() - begin > LONG_WAIT).to(gl.int32)) != 0:
                sure = 1 - any_vacant(S, source, slices)
    stamp(S, step.trace, STAGED)
    target = rows_of(S, memory, step, S.attn, step.record.layer)
    first = head * (S.group * S.head_rows)
    out = out / total[:, None]
    if S.columns == 1:
        dims = gl.arange(0, DIMS, gl.SliceLayout(0, HEAD))[None, :]
        inside = (heads < S.group) & (dims < S.head_rows)
        put(S, step, target + first + heads * S.head_rows + dims, out, inside)
    else:
        put_heads(S, step, target + column * S.o.columns, first, out)


@gluon.jit
def put_heads(S: gl.constexpr, step, target, first, out):
    """Store the heads of a column, fp32 [heads, dims], as words; its row `first` is the first head's first."""
    PAIRS: gl.constexpr = out.shape[1] // 2
    even, odd = gl.split(gl.reshape(out, [out.shape[0], PAIRS, 2]))
    heads = gl.arange(0, out.shape[0], gl.SliceLayout(1, even.type.layout))[:, None]
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, even.type.layout))[None, :]
    word = (first + heads * S.head_rows) // 2 + pair
    put(S, step, target + place_of(S.o.format, word), words_of(even, odd), (heads < S.group) & (2 * pair < S.head_rows))
