"""Limits of the machine: shared memory, the ring, int32 numbers, and memory that no two buffers may share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from instructions.codec import WORDS
from instructions.matvec import staged_pages
from instructions.shape import ANNOUNCED, HELD_PAGES, Shape
from models.formats import FORMATS, PLAIN_NAME
from models.tape import PAGE_BYTES, TILE_BYTES
from scheduler.check.findings import Finding
from scheduler.check.listing import Listing
from scheduler.limits import COUNTER_STRIDE, INT32_MAX, RESERVED, RESERVED_QUANTISED, SHARED_MEMORY

if TYPE_CHECKING:
    from scheduler.program import Program


def lifetime_tokens(program: Program | Listing) -> int:
    """Tokens that a program may finish before its counters must be zeroed, over all launches together.

    A counter with `target` signals a token holds target * tokens, and a wait compares with as much, in int32.
    """
    return INT32_MAX // max(int(program.targets.max(initial=1)), 1)


def launch_tokens(program: Program | Listing) -> int:
    """Tokens that one launch may take: page uses are numbered t * uses + k in int32, anew in every launch."""
    return INT32_MAX // max(int(program.uses.max(initial=1)), 1)


def shared_bytes(shape: Shape, ring: int) -> int:
    """Shared memory of one block: the ring, one staged vector, and the kernel's reserve.

    Staged are, one at a time, the input of a projection, padded to whole parts, that of the experts' down projections once for
    each that is chosen; the hidden state, padded to a power of two of pages; the queries of an attention group.  Of several
    columns none but the queries and the hidden state, that once for each of a power of two of columns.  Behind it lie the sums
    that formats need of its groups, a power of two of KiB, and what lies beside the pages of the ring, either at a multiple of
    its size.
    """
    staged, beside, sums = -(-shape.staged_queries // shape.page_columns) * shape.page_columns, 0, 0
    reserved, repeated = RESERVED, (shape.columns - 1).bit_length()
    for matrix in shape.tape.matrices:
        columns, mixed = matrix.format.columns, matrix.kind == "expert_down"
        pages = -(-matrix.columns // columns) * (shape.config.experts_per_token if mixed else 1)
        if matrix.format.summed and (not repeated or matrix.columns == shape.config.hidden_size):
            sums = max(sums, 1024, 4 * (columns << (pages - 1).bit_length() << repeated) // matrix.format.summed)
        if matrix.columns == shape.config.hidden_size and not mixed:
            pages = 1 << repeated << (pages - 1).bit_length()
        elif shape.columns == 1 and not mixed:
            part = staged_pages(pages, matrix.format)
            pages = -(-pages // part) * part
        elif not mixed:
            pages = 0
        staged = max(staged, pages * columns)
        reserved = reserved if matrix.format.plain else RESERVED_QUANTISED
        beside = max(beside, -(-4 * matrix.format.scale_words // TILE_BYTES) * TILE_BYTES)
    bytes = staged * shape.itemsize
    bytes += -bytes % max(1, sums) + sums
    return ring * (PAGE_BYTES + beside) + bytes + -bytes % max(1, beside) + reserved


def shape_findings(shape: Shape) -> Iterator[Finding]:
    """Sizes that describe no machine; nothing can be derived from such a shape."""
    if shape.itemsize not in (2, 4):
        yield Finding("limits", f"weights of {shape.itemsize} bytes; they have 2 (bf16) or 4 (fp32)")
    if shape.slices < 1:
        yield Finding("limits", f"{shape.slices} attention slices; there is at least 1")
    if min(shape.sequences, shape.depth) != 1 or not 1 <= shape.columns <= 8:
        yield Finding(
            "limits", f"{shape.sequences} sequences of {shape.depth} columns; there are 1 to 8 of either, one of the other"
        )
    if shape.tail and shape.columns > 1:
        yield Finding("limits", f"a tail of {shape.columns} columns; it is for one token")
    several = {PLAIN_NAME, *(name for name, format in FORMATS.items() if format.several)}
    if shape.columns > 1 and (shape.config.num_experts or shape.norms_together or not several.issuperset(shape.formats)):
        yield Finding("limits", f"{shape.columns} columns; a model with experts, common norms or weights in groups has one")
    if not 1 <= shape.bucket <= shape.capacity:
        yield Finding("limits", f"a context bucket of {shape.bucket} positions in a KV cache of {shape.capacity}")


def machine_findings(listing: Listing) -> Iterator[Finding]:
    """What does not fit the machine, or not for as long as one full context takes."""
    shape, ring = listing.shape, listing.ring
    if ring < HELD_PAGES:
        yield Finding("pages", f"a ring of {ring} pages; an instruction may hold {HELD_PAGES} at once and would wait for ever")
    needed = shared_bytes(shape, ring)
    if needed > SHARED_MEMORY:
        yield Finding("limits", f"{needed} bytes of shared memory for a ring of {ring} pages; a block has {SHARED_MEMORY}")
    longest = int(np.diff(listing.starts).max())
    bounds = {
        "counters overflow int32": lifetime_tokens(listing),
        "page use numbers overflow int32": launch_tokens(listing),
        "record numbers overflow int32": INT32_MAX // max(longest, 1),
    }
    for what, tokens in bounds.items():
        if tokens < shape.capacity:
            message = f"{what} after {tokens} tokens; the KV cache holds {shape.capacity}: use more SMs, or a shorter cache"
            yield Finding("limits", message)
    lines = PAGE_BYTES // TILE_BYTES  # what the TMA counts
    numbers = {
        "lines of the weight tape": shape.tape.pages * lines,
        "lines of the KV cache": shape.cache_pages * lines,
        "activation values": shape.arena_elements,
        "constants": shape.tape.constant_count,
        "numbers of the RoPE table": shape.capacity * shape.head_rows,
        "words of the records": (len(listing.items) + 1) * WORDS,
        "words of the counters": len(listing.targets) * COUNTER_STRIDE,
    }
    for what, count in numbers.items():
        if count > INT32_MAX:
            yield Finding("limits", f"{count} {what}; an int32 number cannot count them")
    yield from arena_findings(shape)
    yield from layer_findings(shape)


def arena_findings(shape: Shape) -> Iterator[Finding]:
    """Layers of activation buffers that share memory: the proof orders rows by name, so names must be memory."""
    spans = []
    for name, buffer in shape.buffers.items():
        if name in ("token", "kv") or not buffer.rows:
            continue
        for layer in range(buffer.layers):
            for column in range(shape.columns if buffer.column else 1):
                start = buffer.base + layer * buffer.stride + column * buffer.column
                which = f"{name}[{layer}]" if shape.columns == 1 else f"column {column} of {name}[{layer}]"
                spans.append((start, start + buffer.rows, which))
                if name in ANNOUNCED:
                    second = start + buffer.second
                    spans.append((second, second + buffer.rows, f"the second copy of {which}"))
    spans.sort()
    for (_, stop, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < stop:
            yield Finding("rows", f"{name} and {other} share memory, from activation value {start} on")
    for start, stop, name in (spans[0], spans[-1]) if spans else ():
        if start < 0 or stop > shape.arena_elements:
            yield Finding("rows", f"{name} lies outside the {shape.arena_elements} activation values")


def layer_findings(shape: Shape) -> Iterator[Finding]:
    """Sizes and distances that the kernel takes from the first layers for all of them."""
    tape = shape.tape
    layers = range(shape.config.num_layers)
    for kind in tape.kinds:
        matrices = [tape.matrix(kind, i) for i in layers]
        kept = {(m.blocks, m.pages_per_block, m.bias_offset >= 0, m.head_norm_offset >= 0) for m in matrices}
        if len(kept) > 1:
            yield Finding("limits", f"the matrices {kind} of the layers differ in size, bias or norm; the kernel knows one")
    for kind in (*(linear.kind for linear in tape.layer.linears if linear.source == "hidden"), "head", "embedding"):
        found = tape.matrix(kind)
        needed = -(-shape.config.hidden_size // found.format.columns)
        if found.pages_per_block != needed:
            yield Finding("limits", f"rows of {kind} take {found.pages_per_block} pages; the hidden state needs {needed}")
    yield from expert_findings(shape)
    norms = {step for norm in tape.layer.norms for step in steps([tape.norm_offset(norm.kind, i) for i in layers])}
    offsets = [[tape.matrix(kind, i).bias_offset for i in layers] for kind in tape.kinds]
    offsets += [[tape.matrix(kind, i).head_norm_offset for i in layers] for kind in tape.kinds]
    biases = {step for places in offsets if max(places) >= 0 for step in steps(places)}
    for name, distances in (("norms", norms), ("biases and norms of heads", biases)):
        if len(distances) > 1:
            yield Finding("limits", f"{name} lie {sorted(distances)} constants apart, layer by layer; the kernel knows one")


def expert_findings(shape: Shape) -> Iterator[Finding]:
    """Experts that are no evenly spaced copies of the first: the loader finds one by its number."""
    tape, config = shape.tape, shape.config
    for kind in (linear.kind for linear in tape.layer.linears if linear.experts):
        for layer in range(config.num_layers):
            found = [tape.matrix(kind, layer, expert) for expert in range(config.num_experts)]
            apart = steps([matrix.first_page for matrix in found]) | {found[0].pages}
            if len({(matrix.blocks, matrix.pages_per_block) for matrix in found}) > 1 or len(apart) > 1:
                yield Finding(
                    "limits", f"the experts' {kind} of layer {layer} differ in size or distance; the kernel knows one"
                )


def steps(places: list[int]) -> set[int]:
    """The distances from each place to the next."""
    return {b - a for a, b in zip(places, places[1:], strict=False)}
