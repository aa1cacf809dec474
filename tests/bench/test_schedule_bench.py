"""The benchmark of the scheduler: a table for people, and one line of JSON."""

from __future__ import annotations

import json

import pytest

from bench import schedule as bench_schedule


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_schedule_measures_within_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing for one preset; generous only in that processor time is what counts."""
    status = bench_schedule.main(["--models", "llama-3.2-1b", "--repeats", "1"])
    result = last_line(capsys)
    (record,) = result["records"]
    assert (status, result["within_bound"]) == (0, True)
    assert record["sms"] == 132 and record["instructions"] > 8000
    assert 0 < record["cpu_seconds"] <= 5.0 and 0 < record["peak_bytes"] <= 10**9


def test_schedule_fails_beyond_the_bound(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_schedule, "BOUND_BYTES", 1)
    assert bench_schedule.main(["--models", "llama-3.2-1b", "--repeats", "1", "--sms", "1"]) == 1
    assert last_line(capsys)["within_bound"] is False
