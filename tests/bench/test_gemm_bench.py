"""What `bench.gemm` does beside measuring: plans, lines, refusals, the picture.  The measurements need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gemm import SHAPES, TOKENS, WAYS, line, parser
from bench.gemm_chart import draw, main
from bench.gemm_sweep import plans
from bench.record_file import record_name
from megakernel.gemm.plan import Problem
from models.errors import UserError
from tests.support import ROOT

RECORDS = sorted((ROOT / "bench" / "results").glob("gemm_*.json"))


def shape_of(ways: tuple[str, ...]) -> dict[str, Any]:
    """A shape as a record has it, in which the way number i takes 10 + i microseconds."""
    times = {name: {"median": 10.0 + i, "least": 9.0, "most": 20.0, "runs": []} for i, name in enumerate(ways)}
    tokens = {str(number): {"cuts": {}, "us": times} for number in TOKENS}
    return {"rows": 8192, "columns": 8192, "floor_us": 9.5, "floor_way": "torch.sum", "tokens": tokens}


def test_a_line_says_what_was_measured() -> None:
    told = line(shape_of(("fp8", "plain")), 16)
    assert told == "8192x8192 16 tokens, µs: fp8 10.0, plain 11.0; floor 9.5; fp8 6.71 TB/s"


def test_the_picture_has_every_way_that_was_measured(tmp_path: Path) -> None:
    record = {"shapes": [shape_of(WAYS), shape_of(("fp8", "bf16", "plain"))]}
    picture = draw(record, tmp_path / "picture.svg").read_text()
    assert picture.startswith("<?xml")
    assert draw(record, tmp_path / "again.svg").read_text() == picture, "the same figures give the same file"


def test_the_shapes_are_read_as_they_are_told() -> None:
    assert parser().parse_args([]).shapes == list(SHAPES)
    assert parser().parse_args(["--shapes", "512x256,1024x4096"]).shapes == [(512, 256), (1024, 4096)]
    for text in ("512", "512x100", "0x256", "512x256x2", "ax256"):
        with pytest.raises(UserError, match="--shapes"):
            parser().parse_args(["--shapes", text])


def test_a_sweep_tries_every_tile_with_and_without_a_second_resident() -> None:
    found = list(plans(Problem(8, 8192, 8192), 132))
    assert {plan.cut.consumers for plan in found} == {1, 2, 4}
    assert {plan.cut.residents for plan in found} == {1, 2}
    assert {plan.cut.blocks for plan in found if plan.cut.consumers == 1} == {128, 132}
    assert len(set(found)) == len(found)


def test_without_a_gpu_it_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "bench.gemm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs a GPU" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_records_are_named_for_what_they_hold_and_can_be_drawn(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text())
    assert record_name(record) == path.name
    assert draw(record, tmp_path / "picture.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shapes": [{}]}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    assert main([str(path), str(tmp_path / "picture.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
