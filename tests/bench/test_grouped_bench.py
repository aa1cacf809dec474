"""What `bench.grouped` does beside measuring: its cases, its lines, its record, the picture.  The measurements need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.grouped import HEADER, cases, line
from bench.grouped_chart import draw, main
from bench.grouped_runs import LOADS, MODELS, TOLERANCE, Case, Result, as_json, compare, loop
from bench.record import Spread
from bench.record_file import record_name
from megakernel.grouped.product import grouped_product
from models.errors import MachineError
from tests.support import ROOT

RECORDS = sorted((ROOT / "bench" / "results").glob("grouped_*.json"))
WAYS = {"ours": 430.0, "unbanded": 440.0, "torch": 480.0, "loop": 1000.0, "dense": 290.0}


def result(tokens: int = 4096) -> Result:
    case = Case(MODELS[0], "gate_up", "balanced", tokens)
    spreads = {way: Spread.of([microseconds, microseconds + 10, microseconds - 10]) for way, microseconds in WAYS.items()}
    rates = {way: case.operations / spread.median / 1e6 for way, spread in spreads.items()}
    return Result(case, (217, 256.0, 295), spreads, dict.fromkeys(WAYS, "graph"), rates)


@pytest.mark.parametrize("load", LOADS)
def test_every_load_spreads_all_rows(load: str) -> None:
    for experts in MODELS:
        counts = Case(experts, "gate_up", load, 512).counts()
        assert sum(counts) == 512 * experts.top and len(counts) == experts.experts
        assert counts == Case(experts, "gate_up", load, 512).counts(), "the same every time"
        if load != "one":
            assert max(counts) <= 512, "a token has an expert once"
    assert max(Case(MODELS[0], "down", "zipf", 512).counts()) > 2 * max(Case(MODELS[0], "down", "balanced", 512).counts())


def test_the_quick_cases_are_some_of_all() -> None:
    quick, full = cases(False), cases(True)
    assert set(quick) < set(full) and len(set(full)) == len(full)
    assert {case.experts for case in full} == set(MODELS)
    assert all(Case(model, "gate_up", "balanced", 4096) in quick for model in MODELS[:3]), "those that are compared"


def test_a_line_is_as_wide_as_its_header_and_tells_the_rates() -> None:
    told = line(result())
    assert len(told) == len(HEADER)
    assert "479 (469-491)" in told and told.split()[-3:] == ["429", "206", "711"]


def test_ways_that_there_are_not_of_e4m3_are_left_out(tmp_path: Path) -> None:
    told = result()
    there = {way: rate for way, rate in told.rates.items() if way != "loop"}
    assert line(replace(told, rates=there)).split()[-3:] == ["429", "-", "711"]
    results = json.loads(json.dumps(as_json([replace(told, rates=there)])))
    assert "torch.mm" not in draw({"results": results}, tmp_path / "picture.svg").read_text()
    assert {case.format for case in cases(False, "e4m3")} == {"e4m3"}


def test_the_ways_agree_and_a_difference_is_told() -> None:
    x, w = torch.randn(20, 32).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    y = torch.empty(20, 16, dtype=torch.bfloat16)
    loop(x, w, [7, 0, 13], y)
    compare("ours", grouped_product(x, w, torch.tensor([7, 7, 20], dtype=torch.int32)), y, TOLERANCE["bf16"])
    for wrong in (float("nan"), 1e3):
        other = y.clone()
        other[11, 3] = wrong
        with pytest.raises(MachineError, match="ours differs"):
            compare("ours", other, y, TOLERANCE["e4m3"])


def test_without_a_gpu_it_is_refused_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "bench.grouped"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "needs a GPU" in done.stderr


def record() -> dict[str, Any]:
    return {"benchmark": "grouped", "results": as_json([result(64), result(4096)])}


def test_a_picture_of_a_record(tmp_path: Path) -> None:
    told = json.loads(json.dumps(record()))
    picture = draw(told, tmp_path / "picture.svg").read_text()
    assert picture.startswith("<?xml")
    assert "torch.mm" in picture
    assert draw(told, tmp_path / "again.svg").read_text() == picture, "the same figures give the same file"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_records_are_named_for_what_they_hold_and_can_be_drawn(path: Path, tmp_path: Path) -> None:
    told = json.loads(path.read_text())
    assert record_name(told) == path.name
    assert draw(told, tmp_path / "picture.svg").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [1]}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    assert main([str(path), str(tmp_path / "picture.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "picture.svg").exists()
