"""Completeness: every row has one writer and a reader, every weight is streamed once, all in every token.

What must be written is what is read, and the end of the chain is the token itself: it must be written, so the logits
must, so everything must.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from instructions.base import Region
from instructions.shape import Shape
from scheduler.check.findings import Finding
from scheduler.check.listing import Listing

Key = tuple[str, int]
Span = tuple[int, int, int]  # first row, row after the last, record
ROOT = Region("token", 0, 0, 1)


def spans_by_buffer(regions: list[tuple[Region, ...]]) -> dict[Key, list[Span]]:
    """Accessed rows of every buffer and layer, in order of their first row."""
    spans: dict[Key, list[Span]] = defaultdict(list)
    for i, of_record in enumerate(regions):
        for region in of_record:
            spans[region.buffer, region.layer].append((region.start, region.stop, i))
    for found in spans.values():
        found.sort()
    return dict(spans)


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows as disjoint runs, ascending."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def uncovered(runs: list[tuple[int, int]], cover: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of `runs` that `cover` leaves out; both are disjoint and ascending."""
    for start, stop in runs:
        for first, last in cover:
            if last <= start:
                continue
            if first >= stop:
                break
            if first > start:
                yield start, first
            start = max(start, last)
        if start < stop:
            yield start, stop


def row_findings(listing: Listing) -> Iterator[Finding]:
    """Rows with two writers, rows that are read but not written, rows that are written but not read."""
    writes = spans_by_buffer(listing.writes)
    reads: dict[Key, set[tuple[int, int]]] = defaultdict(set)
    reads[ROOT.buffer, ROOT.layer].add((ROOT.start, ROOT.stop))
    for regions in (listing.reads, listing.loads, listing.selects):
        for region in {region for of_record in regions for region in of_record}:
            reads[region.buffer, region.layer].add((region.start, region.stop))
    for (buffer, layer), spans in writes.items():
        for (_, stop, i), (start, _, j) in zip(spans, spans[1:], strict=False):
            if start < stop:
                yield listing.finding("rows", j, f"row {start} of {buffer}[{layer}] is also written by {listing.place(i)}")
    for key in sorted({*writes, *reads}):
        written = merged([(start, stop) for start, stop, _ in writes.get(key, [])])
        read = merged(list(reads.get(key, ())))
        for start, stop in uncovered(read, written):
            yield Finding("rows", f"{Region(*key, start, stop)} is read, but nobody writes it")
        for start, stop in uncovered(written, read):
            owner = next(i for first, last, i in writes[key] if first <= start < last)
            yield listing.finding("rows", owner, f"writes {Region(*key, start, stop)}, which nobody reads")


def left_out(shape: Shape) -> Iterator[tuple[int, int]]:
    """Pages [first, stop) of the experts that are not chosen, if those are that have the lowest numbers."""
    taken, experts = shape.config.experts_per_token, shape.config.num_experts
    for linear in shape.tape.layer.linears:
        for layer in range(shape.first_layer, shape.config.num_layers) if linear.experts and taken < experts else ():
            first, last = (shape.tape.matrix(linear.kind, layer, expert) for expert in (taken, experts - 1))
            yield first.first_page, last.first_page + last.pages


def weight_findings(listing: Listing) -> Iterator[Finding]:
    """Weight pages that are streamed twice, or by nobody.

    Of the experts of a layer as many are streamed as are chosen, each once: that is asked as if those with the lowest numbers
    were, of which slot j has number j.  `Choose` gives no two slots the same.
    """
    shape = listing.shape
    spans = sorted((*span, i) for i, item in enumerate(listing.items) for span in item.instruction.streams(shape))
    for (_, stop, i), (start, _, j) in zip(spans, spans[1:], strict=False):
        if start < stop:
            yield listing.finding("weights", j, f"page {start} of the tape is also streamed by {listing.place(i)}")
    streamed = merged([(start, stop) for start, stop, _ in spans])
    first = min(shape.matrix(kind, shape.first_layer).first_page for kind in shape.tape.kinds)
    needed = list(uncovered([(first, shape.tape.streamed_pages)], merged(list(left_out(shape)))))
    for start, stop in uncovered(needed, streamed):
        yield Finding("weights", f"pages {start} to {stop - 1} of the tape are streamed by no instruction")
