"""The three files without a browser: what the page holds, SVG that is XML, DOT that follows its grammar."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from hashlib import sha256
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from instructions.codec import Word, decode
from scheduler.costs import duration
from scheduler.draw.__main__ import main
from scheduler.draw.content import Drawing, page_data
from scheduler.draw.dot import dot
from scheduler.draw.page import asset, page
from scheduler.draw.svg import svg
from scheduler.graph import critical_path
from tests.support import ROOT
from tests.support.configs import small_values
from tests.support.drawings import large_drawing, small_drawing

CASES = [("head64_llama3", 6, None), ("head64_llama3", 6, 1), ("gqa4_llama3_tied", 1, None), ("mha", 40, None)]
MOST_BYTES = 5_000_000
D3_SHA256 = "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1"  # of dist/d3.min.js in the npm package d3 7.9.2
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=CASES, ids=str)
def drawing(request: pytest.FixtureRequest) -> Drawing:
    return small_drawing(*request.param)


class PageParser(HTMLParser):
    """Collects what a page refers to, and its data."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append("data" if ("id", "data") in attrs else tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "data":
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(tag)


def parsed(text: str) -> tuple[PageParser, dict[str, Any]]:
    parser = PageParser()
    parser.feed(text)
    content: dict[str, Any] = json.loads(parser.data)
    return parser, content


def test_the_page_holds_the_program(drawing: Drawing) -> None:
    """Every word of every instruction drawn, its cost, who signals and who waits; and asks for nothing outside itself."""
    parser, data = parsed(page(drawing))
    assert parser.links == []
    records = data["records"]
    assert len(records["words"]) == len(drawing.shown)
    for place, i in enumerate(drawing.shown):
        item = drawing.listing.items[i]
        assert decode(records["words"][place]) == item
        assert (records["sm"][place], records["index"][place]) == (drawing.listing.sm[i], drawing.listing.index[i])
        shape = drawing.program.shape
        assert (records["bytes"][place], records["flops"][place]) == item.instruction.cost(shape, drawing.past)
        seconds = duration(item.instruction, shape, drawing.past, drawing.program.sms, drawing.model)
        seconds += drawing.model.ending(item.release) - drawing.model.signal
        assert sum(records["ns"][place]) == pytest.approx(seconds * 1e9, abs=2)
        writes = [data["strings"][number] for number in records["writes"][place]]
        assert writes == [str(region) for region in item.instruction.writes(shape)]
    gate_up = next(i for i in drawing.shown if drawing.listing.items[i].instruction.MNEMONIC == "gate_up")
    signal = drawing.listing.items[gate_up].signals[0]
    layer = drawing.listing.items[gate_up].instruction.layer
    assert f"gate_up (layer {layer})" in data["counters"][signal]["from"]
    assert f"down (layer {layer})" in data["counters"][signal]["to"]


def test_the_critical_path_is_the_graphs(drawing: Drawing) -> None:
    seconds, path = critical_path(drawing.program, drawing.past, drawing.model)
    data = page_data(drawing)
    assert data["pathSeconds"] == seconds
    shown = [drawing.shown.index(i) for i in drawing.on_path() if i in drawing.shown]
    assert [node for node in data["path"] if node >= 0] == shown and shown
    assert data["pathHops"] == sum(node[0] == "i" for node in path)


def test_names_of_words() -> None:
    data = page_data(small_drawing())
    assert data["wordNames"][Word.WAIT + 1] == "WAIT1" and data["wordNames"][Word.PAGES] == "PAGES"
    assert len(data["wordNames"]) == Word.PAYLOAD == data["word"]["PAYLOAD"]


def test_nothing_in_a_name_becomes_a_tag() -> None:
    text = page(small_drawing())
    assert "<title>head64_llama3 &lt;&amp; more&gt;</title>" in text and "<& more>" not in text
    assert parsed(text)[1]["title"] == "head64_llama3 <& more>"


def test_svg_is_xml_with_all_nodes_inside(drawing: Drawing) -> None:
    root = ElementTree.fromstring(svg(drawing))
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    cells = [rect for rect in root.iter(SVG + "rect") if rect.find(SVG + "title") is not None]
    assert len(cells) == len(drawing.shown)
    for rect in cells:
        x, y, wide, high = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 and x + wide <= width and y >= 0 and y + high <= height
    titles = [title.text or "" for path in root.iter(SVG + "path") for title in path.iter(SVG + "title")]
    assert titles.count("critical path") == 1
    assert len(titles) == 1 + sum(place is not None for place in drawing.layout.counters)
    assert sorted(rect[0].text or "" for rect in cells) == sorted(drawing.listing.place(i) for i in drawing.shown)


def test_svg_draws_every_edge(drawing: Drawing) -> None:
    root = ElementTree.fromstring(svg(drawing))
    [edges] = [path for path in root.iter(SVG + "path") if path.get("class") == "edge"]
    counters, expected = drawing.layout.counters, 0
    for i in drawing.shown:
        item = drawing.listing.items[i]
        expected += len(item.signals) + sum(not wait.lag and counters[wait.counter] is not None for wait in item.waits)
    assert edges.attrib["d"].count("M") == expected


# The part of the DOT grammar that is used (https://graphviz.org/doc/info/lang.html): statements end with a semicolon.
QUOTED = r'"(?:[^"\\]|\\.)*"'
ATTRIBUTE = rf"\w+=(?:{QUOTED}|[\w.]+)"
ATTRIBUTES = rf"\[{ATTRIBUTE}(?:, {ATTRIBUTE})*\]"
STATEMENT = re.compile(
    rf"(?P<open>subgraph (?P<cluster>\w+) \{{)|(?P<close>\}})|(?P<from>\w+) -> (?P<to>\w+)(?: {ATTRIBUTES})?;"
    rf"|(?P<node>\w+) {ATTRIBUTES};|{ATTRIBUTE};"
)


def statements(text: str) -> list[re.Match[str]]:
    """The statements of a graph; fails where something is none."""
    head, _, body = text.partition("{")
    assert head == "digraph schedule "
    found, at = [], 0
    body = body.strip()
    while at < len(body):
        match = STATEMENT.match(body, at)
        assert match, f"not DOT: {body[at : at + 60]!r}"
        found.append(match)
        at = match.end()
        while at < len(body) and body[at].isspace():
            at += 1
    return found


def test_dot_follows_its_grammar(drawing: Drawing) -> None:
    """Braces match, every edge joins declared nodes, and there is a node for each instruction and counter drawn."""
    found = statements(dot(drawing))
    nodes = {match["node"] for match in found if match["node"]} - {"node", "edge"}
    instructions = {f"i_{drawing.listing.sm[i]}_{drawing.listing.index[i]}" for i in drawing.shown}
    counters = {f"c_{c}" for c, place in enumerate(drawing.layout.counters) if place}
    assert nodes == instructions | counters
    assert sum(bool(match["close"]) for match in found) == 1 + sum(bool(match["open"]) for match in found)
    for match in found:
        if match["from"]:
            assert {match["from"], match["to"]} <= nodes
    assert sum(bool(match["open"]) for match in found) == len(drawing.layout.groups)


def test_graphviz_reads_the_dot_file(drawing: Drawing) -> None:
    program = shutil.which("nop") or shutil.which("dot")
    if program is None:
        pytest.skip("needs Graphviz, which checks the DOT file: apt-get install graphviz")
    flags = [] if program.endswith("nop") else ["-Tcanon"]
    done = subprocess.run([program, *flags], input=dot(drawing), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_large_model_stays_small() -> None:
    drawing = large_drawing()
    assert len(drawing.shown) > 10_000
    for text in (page(drawing), svg(drawing), dot(drawing)):
        assert len(text.encode()) < MOST_BYTES


def test_the_library_is_the_published_one() -> None:
    """D3 7.9.2 as npm has it, with its licence in the page."""
    assert sha256(asset("d3.min.js").encode()).hexdigest() == D3_SHA256
    assert "Mike Bostock" in asset("d3.LICENSE")
    text = page(small_drawing())
    assert "Permission to use, copy, modify, and/or distribute this software" in text
    assert "</script" not in asset("d3.min.js"), "it would end the script element"


def test_the_wheel_takes_the_assets() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    [pattern] = tool["package-data"]["scheduler"]
    there = {path.relative_to(ROOT / "scheduler") for path in (ROOT / "scheduler").glob(pattern)}
    assert {path.name for path in there} == {path.name for path in files("scheduler.draw").joinpath("assets").iterdir()}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(small_values("gqa2", 1024)))
    common = ["--model", str(model), "--sms", "5", "-o", str(tmp_path / "out")]
    assert main(common) == 0 and main([*common, "--layer", "1"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"tiny-5sms{layer}.{suffix}" for layer in ("", "-layer1") for suffix in ("html", "svg", "dot")
    }
    assert capsys.readouterr().out.count(" MB)\n") == 6
    ElementTree.parse(tmp_path / "out" / "tiny-5sms.svg")
    for wrong, line in ((["--layer", "7"], "layer 7 of a program"), (["-o", str(model / "config.json")], "cannot be written")):
        assert main([*common, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and line in error and error.count("\n") == 1
