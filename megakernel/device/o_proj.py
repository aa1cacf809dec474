"""Device side of `instructions.o_proj`: x_mid[layer] = x[layer] + W_o round(attn[layer]) + b."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.combine import merge_columns, slices_layout
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.matvec import FLAT, PAGE_COLUMNS, largest_divisor, stage
from megakernel.device.projection import projection
from megakernel.device.sync import wait_all

MERGED = gl.constexpr(4096)  # fp32 values of one kind that are loaded together: 32 a thread


@gluon.jit
def stage_slices(S: gl.constexpr, memory, ring, step):
    """Merge the attention slices and stage the result."""
    GROUP: gl.constexpr = largest_divisor(S.attention_pages, MERGED // (PAGE_COLUMNS * S.slices_power))
    SIZE: gl.constexpr = GROUP * PAGE_COLUMNS
    columns = gl.arange(0, SIZE, gl.SliceLayout(0, slices_layout(S.slices_power)))
    staging = reinterpret(ring.staging, gl.bfloat16, [S.attention_pages // GROUP, SIZE], FLAT)
    for part in gl.static_range(S.attention_pages // GROUP):
        merged = merge_columns(S, memory, step, part * SIZE + columns, S.attention_columns)
        staging.index(part).store(merged.to(gl.bfloat16))
    barrier()


@gluon.jit
def o_proj(S: gl.constexpr, memory, ring, step):
    """Row blocks a to a + b of the layer's output projection."""
    wait_all(S, memory, step)
    if S.merges:
        stage_slices(S, memory, ring, step)
    else:
        source = memory.activations + S.attn + step.record.layer * S.attn_stride
        stage(ring, source, S.attention_columns, S.attention_pages)
    projection(
        S,
        memory,
        ring,
        step,
        memory.activations + S.x + step.record.layer * S.x_stride,
        memory.activations + S.x_mid + step.record.layer * S.x_mid_stride,
        memory.constants + S.o_bias + step.record.layer * S.bias_stride,
        S.attention_pages,
        S.o_bias,
    )
