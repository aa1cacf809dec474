"""Device side of `instructions.combine`: the slices of one KV head's query group."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import power_of_two
from megakernel.device.sync import wait_all


@gluon.constexpr_function
def slice_layout():
    """[slices, heads, dims]: every slice of an element in one thread."""
    return gl.BlockedLayout([8, 1, 4], [1, 2, 16], [1, 4, 1], [2, 1, 0])


@gluon.jit
def combine(S: gl.constexpr, memory, ring, step):
    """KV head a."""
    wait_all(S, memory, step)
    L: gl.constexpr = slice_layout()
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    DIMS: gl.constexpr = power_of_two(S.head_rows)
    ALL: gl.constexpr = power_of_two(S.slices)
    source = memory.activations + S.partial + step.record.layer * S.partial_stride + step.record.a * (S.slices * ROWS)

    heads = gl.arange(0, S.group_columns, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    every = gl.arange(0, ALL, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    known = (every[:, None] < S.slices) & (heads[None, :] < S.group)
    maxima = source + every[:, None] * ROWS + heads[None, :]
    m = gl.max(gl.load(maxima, mask=known, other=float("-inf"), cache_modifier=".cg"), axis=0)
    m = gl.where(heads < S.group, m, 0.0)

    HEAD: gl.constexpr = gl.SliceLayout(0, L)
    out = gl.zeros([S.group_columns, DIMS], gl.float32, HEAD)
    total = gl.zeros([S.group_columns], gl.float32, gl.SliceLayout(1, HEAD))
    m = gl.convert_layout(m, gl.SliceLayout(1, HEAD))
    heads = gl.arange(0, S.group_columns, gl.SliceLayout(1, HEAD))
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, HEAD))
    inside = (heads[:, None] < S.group) & (dims[None, :] < S.head_rows)
    for s in range(S.slices):
        part = source + s * ROWS
        known_head = heads < S.group
        slice_m = gl.load(part + heads, mask=known_head, other=float("-inf"), cache_modifier=".cg")
        slice_sum = gl.load(part + S.group + heads, mask=known_head, other=0.0, cache_modifier=".cg")
        rows = part + 2 * S.group + heads[:, None] * S.head_rows + dims[None, :]
        o = gl.load(rows, mask=inside, other=0.0, cache_modifier=".cg")
        weight = gl.exp(slice_m - m)
        total += weight * slice_sum
        out += weight[:, None] * o
    target = memory.activations + S.attn + step.record.layer * S.attn_stride + step.record.a * (S.group * S.head_rows)
    gl.store(target + heads[:, None] * S.head_rows + dims[None, :], out / total[:, None], mask=inside)
