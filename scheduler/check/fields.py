"""Numbers within a record: payload fields, counters, page words.  After this, every region of every record exists.

A field or an instruction that this module has no rule for is a finding: what nobody thought of is not proven.
"""

from __future__ import annotations

from collections.abc import Iterator

from instructions.base import Instruction, Region
from instructions.codec import Scheduled
from instructions.shape import Shape
from scheduler.check.findings import Finding
from scheduler.check.listing import Listing

MATRICES = {"qkv": "qkv", "o_proj": "o", "gate_up": "gate_up", "down": "down", "lm_head": "head"}  # by mnemonic
LAYERED = {"qkv", "attention", "combine", "o_proj", "gate_up", "down"}
ONCE = {"embed", "lm_head", "sample"}  # these belong to no layer and carry 0


def field_range(instruction: Instruction, name: str, shape: Shape, sms: int) -> tuple[int, int]:
    """Smallest and largest value of a payload field; (0, -1) for a field without a rule."""
    blocks = shape.matrix(MATRICES.get(instruction.MNEMONIC, "head")).blocks
    first = getattr(instruction, "block", 0)
    ranges = {
        "block": (0, blocks - 1),
        "blocks": (1, blocks - first),
        "head": (0, shape.config.num_kv_heads - 1),
        "slice": (0, shape.slices - 1),
        "slot": (0, sms - 1),  # the kernel's `Sample` looks at one slot for each SM
        "slots": (1, sms),
    }
    return ranges.get(name, (0, -1))


def payload_problem(instruction: Instruction, shape: Shape, sms: int) -> str | None:
    """Why an instruction's own fields fit no part of the model, or None."""
    kind = instruction.MNEMONIC
    if kind not in LAYERED | ONCE:
        return f"the checker has no rule for the instruction {kind}"
    layers = shape.config.num_layers if kind in LAYERED else 1
    if not 0 <= instruction.layer < layers:
        return f"layer {instruction.layer}, it must be 0 to {layers - 1}"
    for name in instruction.payload_names():
        low, high = field_range(instruction, name, shape, sms)
        value = getattr(instruction, name)
        if not low <= value <= high:
            return f"{name}={value}, it must be {low} to {high}"
    if kind == "combine" and shape.slices == 1:
        return "combines slices in a program whose attention has one slice"
    if kind == "qkv" and not one_run(instruction.writes(shape)):
        return "its row blocks run across the edge between query and key/value rows"
    return None


def one_run(writes: tuple[Region, ...]) -> bool:
    """Whether what a `Qkv` writes is one run of queries, or one run of keys and values with the cache rows to them."""
    return [region.buffer for region in writes] in (["q"], ["new_kv", "kv"])


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
    if item.load_wait is not None and not item.instruction.loads(shape):
        return "its loader waits, but it streams no cache rows: the kernel would not wait"
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
        for region in {*listing.reads[i], *listing.writes[i], *listing.loads[i]}:
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
