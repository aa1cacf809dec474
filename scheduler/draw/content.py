"""What the page shows, as one JSON object: the words of every instruction, its place, its cost, and the critical path.

The page works out waits, signals and queues from the words by itself, with the word numbers given here, so the words are
what is seen.  In `path` and elsewhere a node is a number: instruction i of `records`, or counter c as -1 - c.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

from instructions.codec import MAX_SIGNALS, MAX_WAITS, Word
from instructions.registry import BY_OPCODE
from scheduler.costs import MachineModel, duration, preparation
from scheduler.draw.layout import Layout, arrange
from scheduler.draw.listing import Listing
from scheduler.draw.palette import COLOURS
from scheduler.errors import ScheduleError
from scheduler.graph import Node, critical_path
from scheduler.program import Program


@dataclass(frozen=True, eq=False)
class Drawing:
    """A program, or one layer of it, ready to be written down; `path` is its critical path, all of it."""

    title: str
    program: Program
    past: int
    model: MachineModel
    listing: Listing
    layout: Layout
    seconds: float
    path: list[Node]

    @property
    def shown(self) -> list[int]:
        """The records that are drawn."""
        return [i for i, place in enumerate(self.layout.records) if place is not None]

    def on_path(self) -> list[int]:
        """The critical path as numbers of records and, below zero, of counters (counter c is -1 - c)."""
        starts = self.program.starts
        return [-1 - int(node[1]) if node[0] == "c" else int(starts[int(node[1])]) + int(node[2]) for node in self.path]


def make_drawing(title: str, program: Program, past: int, model: MachineModel, layer: int | None = None) -> Drawing:
    """Lay out a program with `past` positions cached; ScheduleError where there is no such layer."""
    first, layers = program.shape.first_layer, program.shape.config.num_layers
    if layer is not None and not first <= layer < layers:
        raise ScheduleError(f"layer {layer} of a program with layers {first} to {layers - 1}")
    seconds, path = critical_path(program, past, model)
    listing = Listing(program)
    return Drawing(title, program, past, model, listing, arrange(listing, layer), seconds, path)


def crowd(listing: Listing, records: list[int]) -> str:
    """Instructions in words: "128 down (layer 3)"."""
    kinds = collections.Counter((listing.items[i].instruction.MNEMONIC, listing.items[i].instruction.layer) for i in records)
    return ", ".join(f"{count} {mnemonic} (layer {layer})" for (mnemonic, layer), count in kinds.items()) or "nobody"


def readers(listing: Listing) -> list[list[int]]:
    """The records that wait for each counter, consumer or loader, of this token or the one before."""
    found: list[list[int]] = [[] for _ in listing.targets]
    for i, item in enumerate(listing.items):
        for counter in {wait.counter for wait in (*item.waits, *([item.load_wait] if item.load_wait else []))}:
            found[counter].append(i)
    return found


class Strings:
    """A table of strings, each stored once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The place of a string."""
        return self.places.setdefault(text, len(self.places))


def record_columns(drawing: Drawing, strings: Strings) -> dict[str, list[Any]]:
    """What is known of each instruction that is drawn, column by column."""
    program, model, layout = drawing.program, drawing.model, drawing.layout
    columns: dict[str, list[Any]] = collections.defaultdict(list)
    for i in drawing.shown:
        item, place = drawing.listing.items[i], layout.records[i]
        instruction, end = item.instruction, model.ending(item.release)
        assert place is not None
        cost = instruction.cost(program.shape, drawing.past)
        seconds = duration(instruction, program.shape, drawing.past, program.sms, model)
        prepare = preparation(instruction, program.shape, model)
        streaming = seconds - prepare - model.overhead - model.signal
        columns["words"].append(program.words[i].tolist())
        columns["place"].append([place.group, round(place.x, 1), round(place.y, 1)])
        columns["sm"].append(int(drawing.listing.sm[i]))
        columns["index"].append(int(drawing.listing.index[i]))
        columns["bytes"].append(cost.bytes)
        columns["flops"].append(cost.flops)
        columns["ns"].append([round(part * 1e9) for part in (model.overhead + prepare, streaming, end)])
        columns["reads"].append([strings.number(str(region)) for region in drawing.listing.reads[i]])
        columns["writes"].append([strings.number(str(region)) for region in drawing.listing.writes[i]])
    return columns


def counter_columns(drawing: Drawing) -> list[dict[str, Any]]:
    """Every counter: its target, who signals it and who waits for it, and its place if it is drawn."""
    listing, found = drawing.listing, []
    for counter, (producers, waiting) in enumerate(zip(listing.producers, readers(listing), strict=True)):
        place = drawing.layout.counters[counter]
        at = None if place is None else [place.group, round(place.x, 1), round(place.y, 1)]
        target = int(listing.targets[counter])
        found.append({"target": target, "from": crowd(listing, producers), "to": crowd(listing, waiting), "place": at})
    return found


def word_names() -> list[str]:
    """A name for each word of a record up to the payload."""
    names = []
    for number in range(Word.PAYLOAD):
        word = max(known for known in Word if known <= number)
        many = word in (Word.WAIT, Word.TARGET, Word.SIGNAL)
        names.append(f"{word.name}{number - word}" if many else word.name)
    return names


def page_data(drawing: Drawing) -> dict[str, Any]:
    """The whole page's data."""
    program, strings = drawing.program, Strings()
    records = record_columns(drawing, strings)
    number = {i: place for place, i in enumerate(drawing.shown)}
    path = [number.get(node) if node >= 0 else node for node in drawing.on_path()]
    return {
        "title": drawing.title,
        "facts": {
            "SMs": program.sms,
            "instructions": len(number),
            "counters": program.counters,
            "placement": program.policy,
            "pages in the ring": program.ring,
            "positions cached": drawing.past,
            "most positions": program.shape.bucket,
            "attention slices": program.shape.slices,
            "cost model": drawing.model.name,
        },
        "kinds": {
            opcode: {"name": kind.MNEMONIC, "colour": COLOURS[kind.MNEMONIC], "fields": kind.payload_names()}
            for opcode, kind in BY_OPCODE.items()
        },
        "word": {word.name: int(word) for word in Word},
        "wordNames": word_names(),
        "most": {"waits": MAX_WAITS, "signals": MAX_SIGNALS},
        "sms": program.sms,
        "pitch": drawing.layout.pitch,
        "width": drawing.layout.width,
        "groups": [
            {
                "name": group.name,
                "height": group.height,
                "bands": [[band.mnemonic, band.y, band.height, band.count] for band in group.bands],
            }
            for group in drawing.layout.groups
        ],
        "records": records,
        "counters": counter_columns(drawing),
        "strings": list(strings.places),
        "path": [node for node in path if node is not None],
        "pathSeconds": drawing.seconds,
        "pathHops": sum(node >= 0 for node in drawing.on_path()),
    }
