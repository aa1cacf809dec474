"""The benchmark of the checker runs, and ends in a line of JSON that says what it claims."""

from __future__ import annotations

import json

import pytest

from bench.check import CheckRecord, growth
from bench.check import main as check_bench


def test_the_check_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_bench(["--layers", "1", "2", "--repeats", "1"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["layers"] for entry in record["records"]] == [1, 2]
    assert all(0 < entry["cpu_seconds"] <= entry["seconds"] * 2 for entry in record["records"])
    assert record["within_bound"] is True


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_growth_is_the_exponent(exponent: float) -> None:
    records = [CheckRecord(1, n, 0, 0.0, 0.0, 0.0, 3e-5 * n**exponent, 0) for n in (100, 1000, 50000)]
    assert growth(records) == pytest.approx(exponent)
