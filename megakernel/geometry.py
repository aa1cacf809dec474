"""What the kernel is told of a program: the sizes of its shape as plain integers.

The kernel takes one `Geometry` as a compile-time constant, so nothing about a model or an SM count is typed into it.  What
depends on the context bucket or on the length of the KV cache is a `Bucket`, run-time arguments: a model has one kernel.
Every number comes from `instructions.shape` or `models.tape`, the same source as the CPU machine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from instructions.codec import NONE
from instructions.shape import ANNOUNCED, Shape, next_power_of_two
from models.tape import PAGE_BYTES
from scheduler.limits import COUNTER_STRIDE as COUNTER_STRIDE
from scheduler.pages import staging_bytes
from scheduler.program import Program

ITEM_BYTES = 2  # of a weight: the kernel runs bf16
GEMM_PAGES = 4  # most pages whose loads are unrolled together
COPIES = (4, 2)  # TMA copies in flight per SM: for the record that runs, for those ahead of it (docs/performance.md)


@dataclass(frozen=True)
class Geometry:
    """Compile-time sizes; rows, columns and offsets count elements, `*_pages` count 16 KiB pages."""

    ring: int
    copies_now: int  # most TMA copies in flight per SM: for the record that the consumer runs,
    copies_ahead: int  # and for those after it
    staging_pages: int  # pages of one staged activation vector, the widest
    # model
    layers: int
    hidden: int
    hidden_pages: int
    intermediate: int
    intermediate_pages: int
    attention_columns: int
    attention_pages: int
    vocabulary: int
    epsilon: float
    # heads
    group: int
    group_columns: int  # group, rounded up to columns of the matrix instruction
    kv_heads: int
    head_rows: int
    head_blocks: int
    head_tiles: int
    scale: float
    # KV cache
    page_positions: int
    # activations: from the first copy of those that announce themselves to the second, then first elements and distances
    # between layers
    second: int
    x: int
    x_stride: int
    x_mid: int
    x_mid_stride: int
    q: int
    q_stride: int
    new_kv: int
    new_kv_stride: int
    attn: int
    attn_stride: int
    mlp: int
    mlp_stride: int
    logits: int
    best: int
    partial: int  # its distances depend on the bucket
    best_slots: int  # a power of two, at least the number of LM-head instructions
    # constants
    attention_norm: int
    mlp_norm: int
    norm_stride: int  # between layers
    final_norm: int
    biases: bool
    bias_stride: int  # between layers
    qkv_bias: int  # -1: none
    o_bias: int
    gate_up_bias: int
    down_bias: int
    # tape
    embedding_page: int
    trace: bool  # whether the kernel writes time stamps


class Bucket(NamedTuple):
    """What the programs of a model's context buckets differ in: run-time arguments of one kernel, int32."""

    slices: int  # of attention
    head_pages: int  # pages of the KV cache that one K or V head owns
    partial_stride: int  # between layers
    partial_second: int  # from the first copy to the second
    end_counter: int  # signalled by `Sample` alone: every SM waits for it between tokens
    records: int  # of all SMs


def _stride(first: int, second: int) -> int:
    return second - first


def token_counter(program: Program) -> int:
    """The counter that every SM waits for between tokens; raises ValueError where a program has none."""
    if program.end_counter == NONE:
        raise ValueError("the program signals no counter at a token's end")
    return program.end_counter


def make_geometry(program: Program, trace: bool = False) -> Geometry:
    """The geometry of a program with bf16 weights; raises ValueError for another."""
    shape: Shape = program.shape
    if shape.itemsize != ITEM_BYTES:
        raise ValueError(f"a program for weights of {shape.itemsize} bytes: the kernel runs bf16, of {ITEM_BYTES}")
    config, tape = shape.config, shape.tape
    last = min(1, config.num_layers - 1)  # a second layer, where there is one, tells the strides
    biases = {kind: shape.matrix(kind).bias_offset for kind in ("qkv", "o", "gate_up", "down")}
    offsets = {
        name + suffix: value
        for name in ANNOUNCED
        if name != "partial"
        for suffix, value in (("", shape.buffers[name].base), ("_stride", shape.buffers[name].stride))
    }
    return Geometry(
        ring=program.ring,
        copies_now=min(COPIES[0], program.ring),
        copies_ahead=min(COPIES[1], program.ring),
        staging_pages=staging_bytes(shape) // (shape.page_columns * shape.itemsize),
        layers=config.num_layers,
        hidden=config.hidden_size,
        hidden_pages=shape.matrix("qkv").pages_per_block,
        intermediate=config.intermediate_size,
        intermediate_pages=shape.matrix("down").pages_per_block,
        attention_columns=config.num_heads * shape.head_rows,
        attention_pages=shape.matrix("o").pages_per_block,
        vocabulary=config.vocab_size,
        epsilon=config.rms_eps,
        group=config.group,
        group_columns=shape.group_columns,
        kv_heads=config.num_kv_heads,
        head_rows=shape.head_rows,
        head_blocks=shape.head_blocks,
        head_tiles=shape.head_tiles,
        scale=config.head_dim**-0.5,
        page_positions=shape.page_positions,
        second=shape.buffers["x"].second,
        logits=shape.buffers["logits"].base,
        best=shape.buffers["best"].base,
        partial=shape.buffers["partial"].base,
        best_slots=next_power_of_two(program.sms),
        attention_norm=tape.norm_offset("attention", 0),
        mlp_norm=tape.norm_offset("mlp", 0),
        norm_stride=_stride(tape.norm_offset("attention", 0), tape.norm_offset("attention", last)),
        final_norm=tape.norm_offset("final"),
        biases=max(biases.values()) >= 0,
        bias_stride=max(_stride(shape.matrix(kind).bias_offset, shape.matrix(kind, last).bias_offset) for kind in biases),
        qkv_bias=biases["qkv"],
        o_bias=biases["o"],
        gate_up_bias=biases["gate_up"],
        down_bias=biases["down"],
        embedding_page=shape.matrix("embedding").first_page,
        trace=trace,
        **offsets,
    )


def make_bucket(program: Program) -> Bucket:
    """What the kernel is told of a program at run time, beside its words."""
    shape = program.shape
    partial = shape.buffers["partial"]
    return Bucket(
        slices=shape.slices,
        head_pages=shape.head_pages,
        partial_stride=partial.stride,
        partial_second=partial.second,
        end_counter=token_counter(program),
        records=len(program.words),
    )


def pages_bytes(geometry: Geometry) -> int:
    """Shared memory of the ring and of the staged activations."""
    return geometry.ring * PAGE_BYTES + geometry.staging_pages * 1024
