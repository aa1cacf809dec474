"""`bench.formats`: the plain model is no distance from itself, and fewer bits are farther away."""

from __future__ import annotations

import json

import pytest

import bench.formats
from tests.support import BUNDLED


def test_fewer_bits_are_farther_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.formats, "CHOICES", (("bf16", "bf16"), ("fp8", "fp8"), ("int4", "int4")))
    assert bench.formats.main(["--model", str(BUNDLED), "--prompts", "2", "--tokens", "8"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["formats"]
    plain, fp8, int4 = (record["kl"] for record in found)
    assert 0 <= plain < 1e-9 < fp8 < int4
    assert found[0]["same_top"] == 1.0
    assert abs(found[0]["nll_rise"]) < 1e-5
