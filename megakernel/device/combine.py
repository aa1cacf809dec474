"""Device side of `instructions.combine`: the attention slices of one KV head's query group, merged column by column."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.matvec import power_of_two
from megakernel.device.sync import wait_all


@gluon.constexpr_function
def slices_layout(slices):
    """[slices, columns]: all slices of a column in one thread, which sums them in order, all loads in flight at once."""
    return gl.BlockedLayout([slices, 4], [1, 32], [1, 4], [1, 0])


@gluon.jit
def merge_columns(S: gl.constexpr, memory, step, columns, end):
    """The attention output at some columns [n] of [heads * dp], zero from column `end` on: fp32 [n]."""
    L: gl.constexpr = slices_layout(S.slices_power)
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    slices = gl.arange(0, S.slices_power, gl.SliceLayout(1, L))[:, None]
    column = columns[None, :]
    query = column // S.head_rows
    head, member = query // S.group, query % S.group
    left = memory.activations + S.partial + step.record.layer * S.partial_stride + (head * S.slices + slices) * ROWS
    known = (slices < S.slices) & (column < end)
    output = left + 2 * S.group + member * S.head_rows + column % S.head_rows
    m = gl.load(left + member, mask=known, other=float("-inf"), cache_modifier=".cg")
    total = gl.load(left + S.group + member, mask=known, other=0.0, cache_modifier=".cg")
    o = gl.load(output, mask=known, other=0.0, cache_modifier=".cg")
    inside = columns < end
    top = gl.where(inside, gl.max(m, axis=0), 0.0)
    weight = gl.exp(m - top[None, :])
    return gl.sum(weight * o, axis=0) / gl.where(inside, gl.sum(weight * total, axis=0), 1.0)


@gluon.jit
def combine(S: gl.constexpr, memory, ring, step):
    """KV head a."""
    COUNT: gl.constexpr = S.group * S.head_rows
    wait_all(S, memory, step)
    first = step.record.a * COUNT
    columns = first + gl.arange(0, power_of_two(COUNT), gl.SliceLayout(0, slices_layout(S.slices_power)))
    out = merge_columns(S, memory, step, columns, first + COUNT)
    target = memory.activations + S.attn + step.record.layer * S.attn_stride
    gl.store(target + columns, out, mask=columns < first + COUNT)
