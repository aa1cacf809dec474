"""What the kernel is told of a program: the sizes of its shape as plain integers.

The kernel takes one `Geometry` as a compile-time constant, so nothing about a model or an SM count is typed into it.  What
depends on the context bucket or on the length of the KV cache is a `Bucket`, run-time arguments: a model has one kernel.
Every number comes from `instructions.shape` or `models.tape`, the same source as the CPU machine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from instructions.codec import NONE
from instructions.dimensions import Dimensions
from instructions.matvec import staged_pages
from instructions.shape import ANNOUNCED, Shape, ceil_div, next_power_of_two
from models.formats import WeightFormat
from models.tape import PAGE_BYTES
from scheduler.limits import COUNTER_STRIDE as COUNTER_STRIDE
from scheduler.pages import beside_bytes, staging_bytes, sums_bytes
from scheduler.program import Program

ITEM_BYTES = 2  # of what the matrices multiply, of the KV cache and of plain weights: the kernel runs bf16
BOX_WORDS = 256  # the most elements of a TMA box in one dimension
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
    pages: int  # of one row block,
    staged: int  # of those, the ones whose part of the activation is staged together
    norm: Places  # weights of its input's norm in the constants, by layer
    bias: Places  # in the constants, by layer
    format: WeightFormat


class Experts(NamedTuple):
    """A layer's mixture; all 0 in models without any."""

    total: int
    chosen: int  # slots of a token
    renormalised: bool
    blocks: int  # row blocks of one expert's gate/up matrix
    gate_up_apart: int  # pages from one expert's gate/up matrix to the next one's
    down_apart: int  # the same of down matrices
    down_pages: int  # pages of a row block of one slot's down matrix; `expert_down` has those of all slots,
    down_halved: bool  # and of the last of them only the first half is read


NO_EXPERTS = Experts(0, 0, False, 0, 0, 0, 0, False)


@dataclass(frozen=True)
class Geometry:
    """Compile-time sizes; rows, columns and offsets count elements, `pages` counts 16 KiB pages."""

    ring: int
    copies_now: int  # most TMA copies in flight per SM: for the record that the consumer runs,
    copies_ahead: int  # and for those after it
    sums_pages: int  # KiB of the sums of a staged activation, at the end of
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
    attention_width: int  # columns of a step that one attention instruction takes
    attention_columns: int  # group_columns for the groups of all of these
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
    scores: Rows
    choice: Rows
    expert_mlp: Rows
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
    router: Matrix
    expert_gate_up: Matrix
    expert_down: Matrix  # its columns are one slot's
    head: Matrix
    embedding: Places  # first pages of its row blocks
    head_apart: bool  # whether the head has another format than the layers' matrices
    head_first: int  # first page of the head
    norms_together: bool  # whether all queries are normed together, and all keys
    experts: Experts
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
    pages = found.pages_per_block
    return Matrix(found.columns, pages, staged_pages(pages, found.format), norm, bias, found.format)


def _experts(shape: Shape) -> Experts:
    config = shape.config
    if not config.num_experts:
        return NO_EXPERTS
    gate_up, down = (shape.matrix(kind) for kind in ("expert_gate_up", "expert_down"))
    return Experts(
        total=config.num_experts,
        chosen=config.experts_per_token,
        renormalised=config.renormalised,
        blocks=gate_up.blocks,
        gate_up_apart=gate_up.pages,
        down_apart=down.pages,
        down_pages=down.pages_per_block,
        down_halved=shape.tape.halved,
    )


def make_geometry(program: Program, trace: bool = False) -> Geometry:
    """The geometry of a program with bf16 weights; raises ValueError for another."""
    shape: Shape = program.shape
    if shape.itemsize != ITEM_BYTES:
        raise ValueError(f"a program for weights of {shape.itemsize} bytes: the kernel runs bf16, of {ITEM_BYTES}")
    config, tape = shape.config, shape.tape
    norms = {norm.kind: _by_layer(shape, partial(tape.norm_offset, norm.kind)) for norm in tape.layer.norms}
    missing = Matrix(0, 0, 1, NOWHERE, NOWHERE, shape.matrix("qkv").format)
    of_layers: dict[str, Any] = dict.fromkeys(("gate_up", "down", "router", "expert_gate_up", "expert_down"), missing)
    for linear in tape.layer.linears:
        of_layers[linear.kind] = _matrix(shape, linear.kind, norms[linear.norm.kind] if linear.norm else NOWHERE)
    slots = max(1, config.experts_per_token)  # whose pages make a row block of `expert_down`
    of_layers["expert_down"] = of_layers["expert_down"]._replace(pages=slots * of_layers["expert_down"].pages)
    embedding = shape.matrix("embedding")
    places: dict[str, Any] = {name: Rows(*shape.buffers[name][2:5]) for name in ANNOUNCED if name != "partial"}
    return Geometry(
        ring=program.ring,
        copies_now=min(COPIES[0], program.ring),
        copies_ahead=min(COPIES[1], program.ring),
        sums_pages=sums_bytes(shape) // STAGING_BYTES,
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
        attention_width=shape.attention_width,
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
        **of_layers,
        head=_matrix(shape, "head", Places(tape.norm_offset(tape.norm_before("head")), 0), biased=False),
        embedding=Places(embedding.first_page, embedding.pages_per_block),
        head_norm=_by_layer(shape, lambda layer: shape.matrix("qkv", layer).head_norm_offset),
        head_apart=shape.matrix("head").format != shape.matrix("qkv").format,
        head_first=shape.matrix("head").first_page,
        norms_together=shape.norms_together,
        experts=_experts(shape),
        trace=trace,
        **places,
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


def beside_box(words: int) -> list[int]:
    """How TMA copies so many words beside a page: lines, and words of a line, of which it takes no more at once."""
    line = min(words, BOX_WORDS)
    return [words // line, line]


def pages_bytes(geometry: Geometry) -> int:
    """Shared memory of the ring and of the staged activations."""
    return geometry.ring * PAGE_BYTES + (geometry.staging_pages + geometry.beside_pages) * STAGING_BYTES
