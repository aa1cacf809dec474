"""The memory promise of the loader, kept on a small model in a process of its own; and the benchmark sees it broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.load import MEGABYTE, main
from models.config import ModelConfig
from models.synthetic import write_synthetic
from tests.support import ROOT

# 201 MB in shards of 40: what the process takes beside the promise (chunks, the allocator: about 20 MB) fits into one
CONFIG = ModelConfig(1024, 3072, 8, 8, 4, 128, 2048, tied_embeddings=True, max_position=512)
HOARDER = """
import sys
import bench.load
from models.packed import pack
from models.weights import Weights
bench.load.pack = lambda source, *rest: pack(Weights.collect(source), *rest)
sys.exit(bench.load.main(sys.argv[1:]))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory figures")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic")
    write_synthetic(CONFIG, directory, 40 * MEGABYTE)
    return directory


def run(*command: str) -> tuple[int, dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    return result.returncode, json.loads(result.stdout.splitlines()[-1])


def test_peak_is_the_largest_shard_and_the_packed_weights(checkpoint: Path) -> None:
    status, record = run("-m", "bench.load", "--model", str(checkpoint))
    assert status == 0 and record["within_bound"]
    assert record["bound_bytes"] == record["largest_shard_bytes"] + record["packed_bytes"]
    assert record["largest_shard_bytes"] <= 40 * MEGABYTE + 100_000  # and its header
    assert record["packed_bytes"] <= record["peak_bytes"] <= record["bound_bytes"]
    assert len(list(checkpoint.glob("*.safetensors"))) >= 5


def test_a_loader_that_hoards_is_caught(checkpoint: Path) -> None:
    status, record = run("-c", HOARDER, "--model", str(checkpoint))
    assert status == 1 and not record["within_bound"]
    assert record["peak_bytes"] > record["source_bytes"] + record["packed_bytes"]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/config.json: no such file, give the directory of a complete Hugging Face checkpoint"
    ]
