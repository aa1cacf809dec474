"""The page: template, style, script, library and data joined into one HTML file that asks nothing of the network.

It is drawn with D3 (https://d3js.org, ISC licence, in `assets/`): zooming, finding the node under the mouse, the lists
beside the picture.  The nodes themselves go onto a canvas: at ten thousand instructions a graph library that keeps an
object for each node and edge answers a movement of the mouse in seconds, a canvas in milliseconds.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files

from scheduler.draw.content import Drawing, page_data

SCRIPTS = ("data.js", "view.js", "panel.js", "main.js")


def asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (files("scheduler.draw") / "assets" / name).read_text(encoding="utf-8")


def page(drawing: Drawing) -> str:
    """The file's text."""
    licence = "\n".join(" * " + line for line in asset("d3.LICENSE").splitlines())
    data = json.dumps(page_data(drawing), separators=(",", ":"))
    parts = {
        "title": escape(drawing.title),
        "style": asset("page.css"),
        "licence": f"/* D3, https://d3js.org\n{licence}\n */",
        "library": asset("d3.min.js"),
        "data": data.replace("<", "\\u003c"),  # nothing in it may end the script element
        "script": "\n".join(asset(name) for name in SCRIPTS),
    }
    head, *rest = asset("page.html").split("{{")
    filled = [head]
    for piece in rest:
        name, _, after = piece.partition("}}")
        filled += [parts[name], after]
    return "".join(filled)
