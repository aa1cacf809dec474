"""The in-kernel trace on the GPU: stamps that a step can have, of every kind of instruction, and the same tokens as without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import trace as bench_trace
from bench.rig import Rig
from megakernel.gpu.machine import GpuProgram
from megakernel.stamps import Point as KernelPoint
from scheduler.timeline import Point, load_trace
from tests.support.gpu_models import random_tokens
from tests.support.preparation import CASES

pytestmark = pytest.mark.gpu
TOKENS = 4


def test_a_trace_changes_no_token(bundled_rig: Rig) -> None:
    prompt = random_tokens("bundled", 8, seed=3)
    case = CASES["bundled"]
    first = bundled_rig.page_positions + 1  # in the second bucket, which has slices to combine
    assert first + TOKENS < case.capacity
    bundled_rig.start(prompt)
    bundled_rig.decode(0, first)
    plain = bundled_rig.decode(first, TOKENS)
    program = bundled_rig.program(first)
    assert program.program.shape.slices > 1
    traced = GpuProgram(program.program, bundled_rig.state, patience=bundled_rig.patience, trace_tokens=TOKENS)
    bundled_rig.start(prompt)
    bundled_rig.decode(0, first)
    assert traced.launch(first, TOKENS).land() == plain


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "random:llama-3.2-1b", "--position", "600", "--tokens", str(TOKENS), "--runs", "5"]
    assert bench_trace.main([*arguments, "-o", str(tmp_path)]) == 0
    found = load_trace(tmp_path / "measured.npz")  # which refuses stamps that contradict each other
    assert found.tokens == TOKENS and found.past == 600
    assert found.given == {Point[point.name] for point in KernelPoint}
    record = json.loads((tmp_path / "cost.json").read_text())
    steps = np.array([found.step(token) for token in found.steady]) * 1e-6
    assert np.median(steps) == pytest.approx(record["traced_ms_per_token"]["median"], rel=0.1)
    assert record["cost"] < 0.05, "under 3 %, and something for the noise of five launches"
    assert capsys.readouterr().out.startswith("a token takes ")
