"""What `bench.trace` does without a GPU: whose turn it is, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.trace import alternate
from tests.support import ROOT


def test_measurements_take_turns_and_the_first_of_each_does_not_count() -> None:
    calls: list[str] = []

    def measurement(name: str, step: float) -> float:
        calls.append(name)
        return step * len(calls)

    first, second = alternate(3, lambda: measurement("a", 1.0), lambda: measurement("b", 10.0))
    assert calls == ["a", "b"] * 4
    assert first.runs == [3.0, 5.0, 7.0] and first.median == 5.0
    assert second.runs == [40.0, 60.0, 80.0] and (second.least, second.most) == (40.0, 80.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.trace"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no CUDA GPU found: this command needs a GPU\n"
