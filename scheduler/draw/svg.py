"""The drawing as one SVG file (SVG 1.1): everything unfolded, what the page tells on hover in the titles."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from scheduler.draw.content import Drawing, crowd
from scheduler.draw.layout import CELL_HEIGHT, Place
from scheduler.draw.palette import COLOURS

MARGIN, TOP = 150.0, 92.0
BETWEEN = 16.0  # groups
DIAMOND = 6.0
DARK = "#57606a"
STYLE = (
    "text{font:13px 'DejaVu Sans',Helvetica,Arial,sans-serif;fill:#1f2328}.t{font-size:22px;font-weight:700}"
    ".g{font-size:15px;font-weight:700}.edge{fill:none;stroke:#8c959f;stroke-width:.5;stroke-opacity:.45}"
    ".path{fill:none;stroke:#cf222e;stroke-width:2.5;stroke-linejoin:round}.hot{stroke:#cf222e;stroke-width:2.5}"
)


class Canvas:
    """Places of the file: groups one below the other."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.tops, y = [], TOP
        for group in drawing.layout.groups:
            self.tops.append(y)
            y += group.height + BETWEEN
        self.width, self.height = MARGIN + drawing.layout.width + 20, y

    def at(self, place: Place) -> tuple[float, float]:
        """Centre of a node."""
        return MARGIN + place.x, self.tops[place.group] + place.y

    def node(self, number: int) -> tuple[float, float] | None:
        """Centre of record `number`, or of counter -1 - `number`; None where it is not drawn."""
        layout = self.drawing.layout
        place = layout.records[number] if number >= 0 else layout.counters[-1 - number]
        return None if place is None else self.at(place)


def polyline(points: list[tuple[float, float]]) -> str:
    """Path data through some points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def frame(canvas: Canvas) -> Iterator[str]:
    """Title, legend, groups and the names of their bands."""
    drawing = canvas.drawing
    kinds = {band.mnemonic for group in drawing.layout.groups for band in group.bands}
    yield f'<text class="t" x="20" y="34">{escape(drawing.title)}</text>'
    for place, (name, colour) in enumerate((name, colour) for name, colour in COLOURS.items() if name in kinds):
        yield f'<rect x="{20 + place * 110}" y="52" width="16" height="16" rx="3" fill="{colour}"/>'
        yield f'<text x="{42 + place * 110}" y="65">{name}</text>'
    for group, top in zip(drawing.layout.groups, canvas.tops, strict=True):
        yield (
            f'<rect x="8" y="{top}" width="{canvas.width - 16:.1f}" height="{group.height}" rx="8" '
            'fill="#f6f8fa" stroke="#d0d7de"/>'
        )
        yield f'<text class="g" x="20" y="{top + 22}">{escape(group.name)}</text>'
        for band in group.bands:
            yield f'<text x="20" y="{top + band.y + band.height / 2 + 5:.1f}">{band.mnemonic} × {band.count}</text>'


def edges(canvas: Canvas) -> Iterator[str]:
    """Signals and waits within one token."""
    half = CELL_HEIGHT / 2
    parts = []
    for i in canvas.drawing.shown:
        node, item = canvas.node(i), canvas.drawing.listing.items[i]
        assert node is not None
        for counter in item.signals:
            if end := canvas.node(-1 - counter):
                parts.append(polyline([(node[0], node[1] + half), end]))
        for wait in item.waits:
            if not wait.lag and (end := canvas.node(-1 - wait.counter)):
                parts.append(polyline([end, (node[0], node[1] - half)]))
    yield f'<path class="edge" d="{"".join(parts)}"/>'


def critical(canvas: Canvas) -> Iterator[str]:
    """The part of the critical path that is drawn."""
    points = [point for node in canvas.drawing.on_path() if (point := canvas.node(node))]
    if points:
        yield f'<path class="path" d="{polyline(points)}"><title>critical path</title></path>'


def nodes(canvas: Canvas) -> Iterator[str]:
    """Instructions and counters."""
    drawing, width = canvas.drawing, canvas.drawing.layout.pitch - 4
    listing, hot = drawing.listing, set(drawing.on_path())
    for i in drawing.shown:
        node, instruction = canvas.node(i), listing.items[i].instruction
        assert node is not None
        mark = ' class="hot"' if i in hot else ""
        box = f'x="{node[0] - width / 2:.1f}" y="{node[1] - CELL_HEIGHT / 2:.1f}" width="{width:.1f}" height="{CELL_HEIGHT}"'
        title = escape(listing.place(i))
        yield f'<rect{mark} {box} rx="3" fill="{COLOURS[instruction.MNEMONIC]}"><title>{title}</title></rect>'
    for counter, producers in enumerate(listing.producers):
        if (node := canvas.node(-1 - counter)) is not None:
            mark = ' class="hot"' if -1 - counter in hot else ""
            x, y, d = *node, DIAMOND
            title = escape(f"c{counter}: {listing.targets[counter]} signals from {crowd(listing, producers)}")
            outline = f"M{x:.1f} {y - d:.1f}l{d} {d}l-{d} {d}l-{d} -{d}z"
            yield f'<path{mark} d="{outline}" fill="{DARK}"><title>{title}</title></path>'


def svg(drawing: Drawing) -> str:
    """The file's text."""
    canvas = Canvas(drawing)
    size = f'width="{canvas.width:.0f}" height="{canvas.height:.0f}" viewBox="0 0 {canvas.width:.0f} {canvas.height:.0f}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<title>{escape(drawing.title)}</title>"]
    parts.append(f"<style>{STYLE}</style>")
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    for part in (frame, edges, critical, nodes):
        parts.extend(part(canvas))
    return "\n".join([*parts, "</svg>", ""])
