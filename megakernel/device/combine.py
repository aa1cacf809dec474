"""Device side of `instructions.combine`: the slices of one KV head's query group."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles
from megakernel.device.matvec import power_of_two
from megakernel.device.sync import ALL, wait_all
from megakernel.device.trace import STAGED, stamp
from megakernel.device.values import look, look_again, partials_of, put, vacant, values_of

TOGETHER_MAXIMA = gl.constexpr(16)  # slices whose maxima are loaded at a time; the last one's again where there are fewer
TOGETHER_ELEMENTS = gl.constexpr(4096)  # 32 registers of each of the consumer's threads


@gluon.constexpr_function
def head_layout():
    """[heads, dims] of one slice."""
    return gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])


@gluon.constexpr_function
def slices_together(elements):
    """How many slices of so many elements are loaded at a time."""
    return max(1, TOGETHER_ELEMENTS // elements)


@gluon.jit
def largest_maxima(S: gl.constexpr, slices, source, heads, known):
    """The largest of the slices' maxima for each head, and which heads miss one."""
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    m = gl.full(heads.shape, float("-inf"), gl.float32, heads.type.layout)
    absent = gl.full(heads.shape, 0, gl.int32, heads.type.layout)
    for first in range(0, slices, TOGETHER_MAXIMA):
        for j in gl.static_range(TOGETHER_MAXIMA):
            slice_m = look(source + gl.minimum(first + j, slices - 1) * ROWS + heads, known)
            absent |= vacant(slice_m)
            m = gl.maximum(m, slice_m)
    return m, absent


@gluon.jit
def combine(S: gl.constexpr, memory, ring, step):
    """KV head a."""
    wait_all(S, memory, step, ALL)
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    DIMS: gl.constexpr = power_of_two(S.head_rows)
    slices = memory.bucket.slices
    source = partials_of(S, memory, step) + step.record.a * (slices * ROWS)

    HEAD: gl.constexpr = head_layout()
    heads = gl.arange(0, S.group_columns, gl.SliceLayout(1, HEAD))
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, HEAD))
    known = heads < S.group
    inside = known[:, None] & (dims[None, :] < S.head_rows)
    place = heads[:, None] * S.head_rows + dims[None, :]
    out = gl.zeros([S.group_columns, DIMS], gl.float32, HEAD)
    total = gl.zeros([S.group_columns], gl.float32, gl.SliceLayout(1, HEAD))
    TOGETHER: gl.constexpr = slices_together(S.group_columns * DIMS)
    begin, waiting = cycles(), 1
    while waiting != 0:
        m, unknown = largest_maxima(S, slices, source, heads, known)
        absent = gl.zeros([S.group_columns, DIMS], gl.int32, HEAD) | unknown[:, None]
        out = gl.zeros([S.group_columns, DIMS], gl.float32, HEAD)
        total = gl.zeros([S.group_columns], gl.float32, gl.SliceLayout(1, HEAD))
        for first in range(0, slices, TOGETHER):
            parts = ()
            for j in gl.static_range(TOGETHER):  # all in flight before the first is looked at
                part = source + (first + j) * ROWS
                here = known & (first + j < slices)
                parts += (look(part + heads, here), look(part + S.group + heads, here))
                parts += (look(part + 2 * S.group + place, inside & (first + j < slices)),)
            for j in gl.static_range(TOGETHER):
                absent |= (vacant(parts[3 * j]) | vacant(parts[3 * j + 1]))[:, None] | vacant(parts[3 * j + 2])
                weight = gl.where(first + j < slices, gl.exp(parts[3 * j] - m), 0.0)
                total += weight * parts[3 * j + 1]
                out += weight[:, None] * parts[3 * j + 2]
        waiting = look_again(memory, step, begin, absent)
    stamp(S, step.trace, STAGED)
    target = values_of(S, memory, step) + S.attn + step.record.layer * S.attn_stride + step.record.a * (S.group * S.head_rows)
    put(S, step, target + place, out / total[:, None], inside)
