"""What `bench.prefill` does beside measuring: lengths, lines, refusals, the picture.  The measurements need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.prefill import LENGTHS, first_line, fitting_lengths, kernel_line
from bench.prefill_chart import draw, main
from bench.prefill_runs import Kernels, as_json, experts_with_rows, pieces_of, rows_of
from bench.record import Spread
from bench.record_file import record_name
from models.errors import UserError
from tests.support import ROOT
from tests.support.configs import MIXTURES, random_tensors, small_config
from tests.support.prefill_chains import chain_of, packed

KERNELS = Kernels(0, 512, {"qkv": 20.123}, {"qkv": 12.0}, projections=483.4, cublas=593.1, attention=118.0, sdpa=103.5)
RECORDS = sorted((ROOT / "bench" / "results").glob("prefill_*.json"))


def test_lengths_that_do_not_fit_are_left_out_or_refused() -> None:
    assert fitting_lengths(None, 131072) == list(LENGTHS)
    assert fitting_lengths(None, 512) == [32, 128]
    assert fitting_lengths([1, 511], 512) == [1, 511]
    with pytest.raises(UserError, match="a prompt of 512 tokens and its first do not fit this model: use 1 to 511"):
        fitting_lengths([512], 512)
    with pytest.raises(UserError, match="ask for --lengths"):
        fitting_lengths(None, 32)


def test_lines_say_what_was_measured() -> None:
    assert first_line(512, Spread.of([2.85, 2.8, 2.9])) == "    512 tokens: first token after 2.850 ms (2.800 to 2.900)"
    assert "projections 483 TFLOP/s (cuBLAS 593), attention 118 (SDPA 104)" in kernel_line(KERNELS)
    (told,) = as_json([KERNELS])
    assert told["microseconds"] == {"qkv": 20.12}
    assert experts_with_rows(torch.tensor([3, 3, 10, 11])) == (3, 7)
    assert kernel_line(replace(KERNELS, experts=(3, 7))).endswith(", 3 experts have rows, one 7")


@pytest.mark.parametrize("name", [*MIXTURES, "qwen3"])
def test_a_layer_s_pieces_are_all_its_launches(name: str) -> None:
    """Each once, so that what is timed apart is what a chunk takes; products are counted with the rows that they have."""
    config = small_config(name)
    chain = chain_of(packed(config, random_tensors(config, seed=1)))
    pieces = [launch for piece in pieces_of(chain, 64, 0).values() for launch in piece]
    found, wanted = (Counter(launch.kernel.fn.__name__ for launch in each) for each in (pieces, chain.launches(64)))
    last = Counter(launch.kernel.fn.__name__ for launch in chain.heads(64, 1, keys_alone=True))
    assert found == wanted - last - Counter(["read_embedding"])
    rows = rows_of(chain.plan, 10)
    assert set(rows) <= set(pieces_of(chain, 64, 0)) and set(rows) == set(chain.plan.tape.kinds)
    assert all(count == 10 * (config.experts_per_token if "expert" in kind else 1) for kind, count in rows.items())


def test_without_a_gpu_it_is_refused_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.prefill"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    if "needs a GPU" not in done.stderr:
        pytest.skip("there is a GPU")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_records_are_named_for_what_they_hold_and_can_be_drawn(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text())
    assert record_name(record) == path.name
    picture = draw(record, tmp_path / "picture.svg").read_text()
    assert picture.startswith("<?xml") and "projections" not in record["first_token_ms"]
    assert draw(record, tmp_path / "again.svg").read_text() == picture, "the same figures give the same file"


def test_the_page_s_tables_are_the_records_s() -> None:
    """docs/prompt.md quotes the records that it names, each in a table whose first cell names the model."""
    page = (ROOT / "docs" / "prompt.md").read_text()
    named = [json.loads(path.read_text()) for path in RECORDS if path.name in page]
    assert named
    for record in named:
        model = record["model"].removeprefix("random:")
        (table,) = [table for table in page.split("\n\n") if table.lower().startswith(f"| {model}, tokens |")]
        rows = {row.split("|")[1].strip(): row for row in table.splitlines()[2:]}
        for kernels in record["kernels"]:
            length = f"{kernels['start'] + kernels['tokens']:,}"
            cells = [cell.strip() for cell in rows[length].split("|")[2:-1]]
            spread = record["first_token_ms"][length.replace(",", "")]
            quoted = [float(figure.strip("()").replace(",", "")) for figure in cells[0].split(" ") if figure != "to"]
            assert quoted == [float(f"{spread[part]:.3g}") for part in ("median", "least", "most")]
            rates = [round(kernels[name]) for name in ("projections", "cublas", "attention", "sdpa")]
            assert [int(cell) for cell in cells[1:]] == rates


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"first_token_ms": {"a": 1}}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    assert main([str(path), str(tmp_path / "picture.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "picture.svg").exists()
