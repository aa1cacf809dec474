"""Numbers within a record: payload fields, counters, page words.  After this, every region of every record exists.

What fields may hold, an instruction says itself, like what it reads and writes; a field of which it says nothing is a
finding: what nobody thought of is not proven.
"""

from __future__ import annotations

from collections.abc import Iterator

from instructions.base import Instruction, Region
from instructions.codec import Scheduled
from instructions.shape import Shape
from scheduler.check.findings import Finding
from scheduler.check.listing import Listing


def payload_problem(instruction: Instruction, shape: Shape, sms: int) -> str | None:
    """Why an instruction's own fields fit no part of the model, or None."""
    if instruction.LAYERED is None:
        return f"{instruction.MNEMONIC} does not say whether it belongs to a layer"
    layers = shape.config.num_layers if instruction.LAYERED else 1
    if not 0 <= instruction.layer < layers:
        return f"layer {instruction.layer}, it must be 0 to {layers - 1}"
    if (foreign := instruction.foreign(shape)) is not None:
        return foreign
    ranges = instruction.field_ranges(shape, sms)
    for name in instruction.payload_names():
        if name not in ranges:
            return f"{instruction.MNEMONIC} states no range for {name}"
        low, high = ranges[name]
        value = getattr(instruction, name)
        if not low <= value <= high:
            return f"{name}={value}, it must be {low} to {high}"
    return instruction.misfit(shape) or stray_pages(instruction, shape)


def stray_pages(instruction: Instruction, shape: Shape) -> str | None:
    """Why the pages that it streams are none of the tape, or of the cache, or None."""
    spans: tuple[tuple[int, int], ...]
    if instruction.loads(shape):
        first = instruction.tape_page(shape)
        spans, what, pages = ((first, first + instruction.page_uses(shape)),), "KV cache", shape.cache_pages
    else:
        spans, what, pages = instruction.streams(shape), "weight tape", shape.tape.pages
    stray = [(first, stop) for first, stop in spans if not 0 <= first <= stop <= pages]
    return f"streams pages {stray[0][0]} to {stray[0][1] - 1} of a {what} of {pages}" if stray else None


def region_problem(region: Region, shape: Shape) -> str | None:
    """Why a region is not part of its buffer, or None."""
    buffer = shape.buffers.get(region.buffer)
    if buffer is None:
        return f"{region}: there is no such buffer"
    if not (0 <= region.layer < buffer.layers and 0 <= region.start < region.stop <= buffer.rows):
        return f"{region} lies outside the buffer's {buffer.layers} layers of {buffer.rows} rows"
    return None


def counter_findings(listing: Listing) -> Iterator[Finding]:
    """Counters that do not exist, and one that is signalled twice by one record."""
    count = len(listing.targets)
    for i, item in enumerate(listing.items):
        waits = [*item.waits, *([item.load_wait] if item.load_wait else [])]
        for counter in (*(wait.counter for wait in waits), *item.signals):
            if not 0 <= counter < count:
                yield listing.finding("counter", i, f"there is no counter c{counter}: the program has {count}")
        if len(set(item.signals)) < len(item.signals):
            yield listing.finding("counter", i, f"signals c{item.signals[0]} twice")


def page_problem(item: Scheduled, shape: Shape, expected: int) -> str | None:
    """Why the page words do not fit the instruction, or None; `expected` is the number of its first page use."""
    pages = item.instruction.page_uses(shape)
    tape = item.instruction.tape_page(shape) if pages else 0
    if item.pages != pages:
        return f"takes {item.pages} pages through the ring, it needs {pages}"
    if item.page != expected:
        return f"its page uses begin at {item.page}, but the queue has used {expected} before it"
    if item.tape != tape:
        return f"streams from page {item.tape}, its rows begin at page {tape}"
    if item.load_wait is not None and not (item.instruction.loads(shape) or item.instruction.selects(shape)):
        return "its loader waits, but it streams no cache rows and no chosen experts: the kernel would not wait"
    return None


def field_findings(listing: Listing) -> Iterator[Finding]:
    """Every fault that one record shows by itself, and the running count of page uses."""
    for i, item in enumerate(listing.items):
        problem = payload_problem(item.instruction, listing.shape, listing.sms)
        if problem:
            yield listing.finding("field", i, problem)
    yield from counter_findings(listing)


def region_findings(listing: Listing) -> Iterator[Finding]:
    """Regions outside their buffers; to be asked only when the fields are sound."""
    for i in range(len(listing.items)):
        for region in {*listing.reads[i], *listing.writes[i], *listing.loads[i], *listing.selects[i]}:
            problem = region_problem(region, listing.shape)
            if problem:
                yield listing.finding("field", i, problem)


def page_findings(listing: Listing) -> Iterator[Finding]:
    """Page uses numbered without gaps in queue order, as many as each instruction takes, and their total per SM."""
    for sm in range(listing.sms):
        used = 0
        for i in range(listing.starts[sm], listing.starts[sm + 1]):
            item = listing.items[i]
            problem = page_problem(item, listing.shape, used)
            if problem:
                yield listing.finding("pages", i, problem)
            used = item.page + item.pages
        if used != listing.uses[sm]:
            yield Finding("pages", f"sm {sm} counts {listing.uses[sm]} page uses a token, its queue makes {used}")
