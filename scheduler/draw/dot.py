"""The DAG in the DOT language of Graphviz, for other layouts and other tools: one cluster a layer, counters as diamonds."""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.draw.content import Drawing, crowd
from scheduler.draw.palette import COLOURS


def quoted(text: str) -> str:
    """A double-quoted DOT string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def name(drawing: Drawing, i: int) -> str:
    """The identifier of a record."""
    return f"i_{drawing.listing.sm[i]}_{drawing.listing.index[i]}"


def clusters(drawing: Drawing, hot: set[int]) -> Iterator[str]:
    """Instructions and counters, group by group."""
    listing, layout = drawing.listing, drawing.layout
    for number, group in enumerate(layout.groups):
        yield f"  subgraph cluster_{number} {{ label={quoted(group.name)};"
        for i in drawing.shown:
            place, mnemonic = layout.records[i], listing.items[i].instruction.MNEMONIC
            if place is not None and place.group == number:
                red = ", color=red, penwidth=3" if i in hot else ""
                label = f"{mnemonic}\\nsm {listing.sm[i]} #{listing.index[i]}"
                text = f'label="{label}", fillcolor="{COLOURS[mnemonic]}", tooltip={quoted(listing.text(i))}{red}'
                yield f"    {name(drawing, i)} [{text}];"
        for counter, at in enumerate(layout.counters):
            if at is not None and at.group == number:
                red = ", color=red, penwidth=3" if -1 - counter in hot else ""
                tooltip = quoted(f"{listing.targets[counter]} signals from {crowd(listing, listing.producers[counter])}")
                yield f'    c_{counter} [label="c{counter}", shape=diamond, fillcolor=white, tooltip={tooltip}{red}];'
        yield "  }"


def edges(drawing: Drawing) -> Iterator[str]:
    """Signals, waits, and dashed those of the previous token."""
    counters = drawing.layout.counters
    for i in drawing.shown:
        item, node = drawing.listing.items[i], name(drawing, i)
        for counter in item.signals:
            if counters[counter] is not None:
                yield f"  {node} -> c_{counter};"
        for wait in (*item.waits, *([item.load_wait] if item.load_wait else [])):
            if counters[wait.counter] is not None:
                lag = " [style=dashed, constraint=false]" if wait.lag else ""
                yield f"  c_{wait.counter} -> {node}{lag};"


def dot(drawing: Drawing) -> str:
    """The file's text."""
    head = [
        "digraph schedule {",
        f"  label={quoted(drawing.title)}; labelloc=t; rankdir=TB; ranksep=1.2; outputorder=edgesfirst;",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica"]; edge [color="#8c959f"];',
    ]
    return "\n".join([*head, *clusters(drawing, set(drawing.on_path())), *edges(drawing), "}", ""])
