"""What the kernel is told of a program: the sizes of its shape as plain integers.

The kernel takes one `Geometry` as a compile-time constant, so nothing about a model or an SM count is typed into it.  What
depends on the context bucket or on the length of the KV cache is a `Bucket`, run-time arguments: a model has one kernel.
Every number comes from `instructions.shape` or `models.tape`, the same source as the CPU machine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from instructions.codec import NONE
from instructions.dimensions import Dimensions
from instructions.shape import ANNOUNCED, Shape, ceil_div, next_power_of_two
from models.formats import WeightFormat
from models.tape import PAGE_BYTES
from scheduler.limits import COUNTER_STRIDE as COUNTER_STRIDE
from scheduler.pages import beside_bytes, staging_bytes
from scheduler.program import Program

ITEM_BYTES = 2  # of what the matrices multiply, of the KV cache and of plain weights: the kernel runs bf16
STAGING_BYTES = 1024  # unit of the memory for staged activations
TOKEN_SLACK = 64  # numbers behind the tokens of a sequence: the next token, and drafts
COPIES = (4, 2)  # TMA copies in flight per SM: for the record that runs, for those ahead of it (docs/performance.md)


class Places(NamedTuple):
    """Numbered places, evenly spaced: number n lies at `first + n * stride`."""

    first: int  # -1: there are none
    stride: int


NOWHERE = Places(NONE, 0)


class Rows(NamedTuple):
    """A buffer of activations: layer n lies at `first + n * stride`, column c of it `c * column` behind."""

    first: int
    stride: int
    column: int  # 0: rows of every column have names of their own


class Matrix(NamedTuple):
    """A matrix of the tape, and what goes with it in every layer."""

    columns: int
    pages: int  # of one row block
    norm: Places  # weights of its input's norm in the constants, by layer
    bias: Places  # in the constants, by layer
    format: WeightFormat


@dataclass(frozen=True)
class Geometry:
    """Compile-time sizes; rows, columns and offsets count elements, `pages` counts 16 KiB pages."""

    ring: int
    copies_now: int  # most TMA copies in flight per SM: for the record that the consumer runs,
    copies_ahead: int  # and for those after it
    staging_pages: int  # KiB of one staged activation vector, the widest,
    beside_pages: int  # and behind it of the scales beside the pages of the ring, of quantised weights
    beside_bytes: int  # of one of them
    # model
    layers: int
    hidden: int
    vocabulary: int
    epsilon: float
    embedding_multiplier: float  # 1: the kernel leaves the product out; the same of those below
    residual_multiplier: float
    logits_multiplier: float
    # heads
    sequences: int
    depth: int  # columns of each
    columns: int  # of all
    group: int
    group_columns: int  # group, rounded up to columns of the matrix instruction
    attention_columns: int  # the same for the groups of all columns of a sequence
    kv_heads: int
    head_dim: int
    head_rows: int  # head_dim, rounded up to row blocks
    head_blocks: int
    head_tiles: int
    scale: float
    # KV cache
    page_positions: int
    # activations: from the first copy of those that announce themselves to the second, then their places by layer
    second: int
    x: Rows
    x_mid: Rows
    q: Rows
    new_kv: Rows
    squares: Rows  # one a row block of a query or key head, where heads are normed
    attn: Rows
    mlp: Rows
    logits: int
    logits_column: int  # from one column to the next
    best: int
    best_column: int
    partial: int  # its distances depend on the bucket
    best_slots: int  # a power of two, at least the number of LM-head instructions
    # constants
    head_norm: Places  # weights of a query head, then of a key head, by layer
    # tape
    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    head: Matrix
    embedding: Places  # first pages of its row blocks
    head_apart: bool  # whether the head has another format than the layers' matrices
    head_first: int  # first page of the head
    trace: bool  # whether the kernel writes time stamps


class Bucket(NamedTuple):
    """What the programs of a model's context buckets differ in: run-time arguments of one kernel, int32."""

    slices: int  # of attention
    head_pages: int  # pages of the KV cache that one K or V head owns
    partial_stride: int  # between layers
    partial_second: int  # from the first copy to the second
    end_counter: int  # signalled by `Sample` alone: every SM waits for it between tokens
    records: int  # of all SMs


def token_counter(program: Program) -> int:
    """The counter that every SM waits for between tokens; raises ValueError where a program has none."""
    if program.end_counter == NONE:
        raise ValueError("the program signals no counter at a token's end")
    return program.end_counter


def _by_layer(shape: Shape, offset: Callable[[int], int]) -> Places:
    """The places of what lies at `offset(layer)`; a second layer, where there is one, tells the stride."""
    first = offset(0)
    return Places(first, offset(min(1, shape.config.num_layers - 1)) - first)


def _matrix(shape: Shape, kind: str, norm: Places = NOWHERE, biased: bool = True) -> Matrix:
    found = shape.matrix(kind)
    bias = _by_layer(shape, lambda layer: shape.matrix(kind, layer).bias_offset) if biased else NOWHERE
    return Matrix(found.columns, found.pages_per_block, norm, bias, found.format)


def make_geometry(program: Program, trace: bool = False) -> Geometry:
    """The geometry of a program with bf16 weights; raises ValueError for another."""
    shape: Shape = program.shape
    if shape.itemsize != ITEM_BYTES:
        raise ValueError(f"a program for weights of {shape.itemsize} bytes: the kernel runs bf16, of {ITEM_BYTES}")
    config, tape = shape.config, shape.tape
    attention_norm, mlp_norm = (
        _by_layer(shape, partial(tape.norm_offset, tape.norm_before(kind))) for kind in ("qkv", "gate_up")
    )
    embedding = shape.matrix("embedding")
    return Geometry(
        ring=program.ring,
        copies_now=min(COPIES[0], program.ring),
        copies_ahead=min(COPIES[1], program.ring),
        staging_pages=staging_bytes(shape) // STAGING_BYTES,
        beside_pages=ceil_div(program.ring * beside_bytes(shape), STAGING_BYTES),
        beside_bytes=beside_bytes(shape),
        layers=config.num_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        epsilon=config.rms_eps,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_multiplier=shape.logits_multiplier,
        sequences=shape.sequences,
        depth=shape.depth,
        columns=shape.columns,
        group=config.group,
        group_columns=shape.group_columns,
        attention_columns=shape.attention_columns,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        head_rows=shape.head_rows,
        head_blocks=shape.head_blocks,
        head_tiles=shape.head_tiles,
        scale=config.attention_scale,
        page_positions=shape.page_positions,
        second=shape.buffers["x"].second,
        logits=shape.buffers["logits"].base,
        logits_column=shape.buffers["logits"].column,
        best=shape.buffers["best"].base,
        best_column=shape.buffers["best"].column,
        partial=shape.buffers["partial"].base,
        best_slots=next_power_of_two(program.sms),
        qkv=_matrix(shape, "qkv", attention_norm),
        o=_matrix(shape, "o"),
        gate_up=_matrix(shape, "gate_up", mlp_norm),
        down=_matrix(shape, "down"),
        head=_matrix(shape, "head", Places(tape.norm_offset(tape.norm_before("head")), 0), biased=False),
        embedding=Places(embedding.first_page, embedding.pages_per_block),
        head_norm=_by_layer(shape, lambda layer: shape.matrix("qkv", layer).head_norm_offset),
        head_apart=shape.matrix("head").format != shape.matrix("qkv").format,
        head_first=shape.matrix("head").first_page,
        trace=trace,
        **{name: Rows(*shape.buffers[name][2:5]) for name in ANNOUNCED if name != "partial"},
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


def token_stride(shape: Dimensions) -> int:
    """From the tokens of one sequence to those of the next, in numbers."""
    return shape.head_pages * shape.page_positions + TOKEN_SLACK


def pages_bytes(geometry: Geometry) -> int:
    """Shared memory of the ring and of the staged activations."""
    return geometry.ring * PAGE_BYTES + (geometry.staging_pages + geometry.beside_pages) * STAGING_BYTES
