"""docs/performance.md and its notebook: figures that have records are those of the records, and tables can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PERFORMANCE = ROOT / "docs" / "performance.md"
NOTEBOOK = ROOT / "docs" / "notebook"
TODAY = {"h100": "dd21996", "h200": "9c58719"}  # the commits whose records of the 1B model performance.md quotes
LARGER = "9c58719"  # and of the larger models
POSITIONS = (32, 96, 1024, 4096, 16384)
CELL = 100  # characters of a table's cell, at most


def record(gpu: str, model: str, commit: str) -> dict[int, dict[str, Any]]:
    """What a record of `bench.decode` says of each position."""
    (path,) = ROOT.glob(f"bench/results/decode_{gpu}*_{model}_????-??-??_{commit}.json")
    return {context["context"]: context for context in json.loads(path.read_text(encoding="utf-8"))["contexts"]}


def tables(page: Path) -> list[list[list[str]]]:
    """The cells of every table, row by row; without the line below the first row."""
    found = re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]


def told(context: dict[str, Any]) -> list[str]:
    """A token, its floor, and how many times that it took, as the page rounds them."""
    step, floor = context["ms_per_token"]["median"], context["floor_ms"]
    return [f"{step:.3f}", f"{floor:.3f}", f"{step / floor:.3f}"]


def test_today_s_tables_are_those_of_the_records() -> None:
    small, large, *_ = tables(PERFORMANCE)
    h100, h200 = (record(gpu, "llama-3.2-1b", commit) for gpu, commit in TODAY.items())
    sums = {at: f"{h100[at]['floor_ms_by_way']['torch.sum']:.3f}" for at in POSITIONS}
    assert small[1:] == [[str(at), *told(h100[at]), sums[at], *told(h200[at])] for at in POSITIONS]
    for name, *figures in large[1:]:
        contexts = record("h100", name.lower(), LARGER)
        assert figures == told(contexts[96]) + told(contexts[1024])


@pytest.mark.parametrize(("table", "gpu"), [(0, "h100"), (1, "h200")])
def test_the_history_is_that_of_the_records(table: int, gpu: str) -> None:
    steps, floors = tables(NOTEBOOK / "history.md")[table], tables(NOTEBOOK / "history.md")[2]
    for name, *figures in steps[1:]:
        contexts = record(gpu, "llama-3.2-1b", name.strip("`"))
        assert figures[:-1] == [told(contexts[at])[0] for at in POSITIONS]
        (row,) = [row for row in floors if row[0] in (name, f"{name}, {gpu.upper()}")]
        assert row[1:] == [told(contexts[at])[1] for at in POSITIONS]


@pytest.mark.parametrize("page", [PERFORMANCE, *sorted(NOTEBOOK.glob("*.md"))], ids=lambda page: page.name)
def test_tables_are_short_and_whole(page: Path) -> None:
    """Every row has the columns of the first, and no cell is a paragraph; a link counts as its words."""
    for table in tables(page):
        assert {len(row) for row in table} == {len(table[0])}
        assert [cell for row in table for cell in row if len(re.sub(r"\]\([^)]*\)", "]", cell)) > CELL] == []


def test_the_notebook_s_index_has_every_page() -> None:
    indexed = {row[0] for row in tables(NOTEBOOK / "README.md")[0][1:]}
    assert indexed == {f"[{page.name}]({page.name})" for page in NOTEBOOK.glob("*.md") if page.name != "README.md"}
