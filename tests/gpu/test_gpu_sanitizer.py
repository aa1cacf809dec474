"""compute-sanitizer finds nothing: no access outside an allocation, no barrier used wrongly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.sanitized import decoded

pytestmark = pytest.mark.gpu
# Triton 3.9 asks the driver for a kind of shared memory that CUDA 13.0 does not know, and falls back to another: a refusal by
# the driver is no access outside an allocation.
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "synccheck": []}
FOUND = 9  # exit status of compute-sanitizer where it found something


def sanitizer() -> str:
    """The tool; the test is skipped where there is none."""
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if path is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    return path


@pytest.mark.parametrize("tool", OPTIONS)
def test_clean(tool: str) -> None:
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND), *OPTIONS[tool]]
    command += [sys.executable, "-m", "tests.support.sanitized"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer cannot debug on this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    assert str(decoded()) in done.stdout, "and the tokens are those without it"
