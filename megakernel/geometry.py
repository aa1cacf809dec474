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
    embedding_multiplier: float  # 1: the kernel leaves the product out; the same of those below
    residual_multiplier: float
    logits_multiplier: float
    # heads
    group: int
    group_columns: int  # group, rounded up to columns of the matrix instruction
    kv_heads: int
    head_dim: int
    head_rows: int  # head_dim, rounded up to row blocks
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
    squares: int  # one a row block of a query or key head, where heads are normed
    squares_stride: int
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
    bias_stride: int  # between layers, of the norms of heads as well
    qkv_bias: int  # -1: none
    o_bias: int
    gate_up_bias: int
    down_bias: int
    head_norm: int  # weights of a query head, then of a key head; -1: heads are not normed
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
    biases = {kind: shape.matrix(kind).bias_offset for kind in tape.kinds}
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
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_multiplier=shape.logits_multiplier,
        group=config.group,
        group_columns=shape.group_columns,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        head_rows=shape.head_rows,
        head_blocks=shape.head_blocks,
        head_tiles=shape.head_tiles,
        scale=config.attention_scale,
        page_positions=shape.page_positions,
        second=shape.buffers["x"].second,
        logits=shape.buffers["logits"].base,
        best=shape.buffers["best"].base,
        partial=shape.buffers["partial"].base,
        best_slots=next_power_of_two(program.sms),
        attention_norm=tape.norm_offset(tape.norm_before("qkv")),
        mlp_norm=tape.norm_offset(tape.norm_before("gate_up")),
        norm_stride=_stride(*(tape.norm_offset(tape.norm_before("qkv"), layer) for layer in (0, last))),
        final_norm=tape.norm_offset(tape.norm_before("head")),
        biases=max(biases.values()) >= 0,
        bias_stride=max(
            _stride(getattr(shape.matrix(kind), place), getattr(shape.matrix(kind, last), place))
            for kind in tape.kinds
            for place in ("bias_offset", "head_norm_offset")
        ),
        qkv_bias=biases["qkv"],
        o_bias=biases["o"],
        gate_up_bias=biases["gate_up"],
        down_bias=biases["down"],
        head_norm=shape.matrix("qkv").head_norm_offset,
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
