"""docs/pictures.md: its pictures are there and small, its commands are those of the program, its words those of the report."""

from __future__ import annotations

import re
import shlex

import pytest

from bench.trace import parser as trace_parser
from scheduler.draw.__main__ import parser as draw_parser
from scheduler.timeline import Point
from scheduler.timeline.__main__ import parser as timeline_parser
from scheduler.timeline.account import DRAWERS
from scheduler.timeline.trace import REQUIRED
from tests.support import ROOT

DOCS = ROOT / "docs"
TEXT = (DOCS / "pictures.md").read_text(encoding="utf-8")
PARSERS = {"scheduler.draw": draw_parser, "scheduler.timeline": timeline_parser, "bench.trace": trace_parser}
MOST_BYTES = 300_000


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links(link: str) -> None:
    if not link.startswith("https://"):
        assert (DOCS / link).exists()
    if link.endswith(".png"):
        assert (DOCS / link).stat().st_size < MOST_BYTES


@pytest.mark.parametrize("line", re.findall(r"^python -m .*$", TEXT, flags=re.MULTILINE))
def test_commands(line: str) -> None:
    """They parse; whether they work is tested elsewhere."""
    _, _, module, *arguments = shlex.split(line, comments=True)
    PARSERS[module]().parse_args(arguments)


def test_words() -> None:
    table = TEXT.split("<!-- anatomy -->")[1].split("<!-- /anatomy -->")[0]
    assert all(words in table for words in DRAWERS.values())
    rows = dict(re.findall(r"^\| ([A-Z_, ]+) \| .* \| (.*) \|$", TEXT, flags=re.MULTILINE))
    described = {name for names in rows for name in names.split(", ")}
    assert described == {point.name for point in Point}
    assert {name for name, without in rows.items() if without == "refused"} == {point.name for point in REQUIRED}
