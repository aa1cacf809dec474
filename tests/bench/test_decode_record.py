"""What `bench.decode` computes beside its measurements: bytes, limits, names.  The measurements need a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.decode import CONTEXTS, TOKENS, fitting_contexts, parser
from bench.decode_runs import data_sheet_bandwidth, kv_bytes
from bench.read_floor import Floor
from bench.record import Spread
from bench.record_file import record_name
from models.errors import UserError
from models.families import PRESETS
from models.weights import parameter_count
from scheduler.build import make_shape
from tests.support import ROOT


def test_bytes_a_token() -> None:
    """Llama-3.2-1B: 16 layers of 8 KV heads of 64 dimensions, K and V in bf16; 1.236 billion weights, all but the norms'."""
    shape = make_shape(PRESETS["llama-3.2-1b"], sms=132, capacity=4096, bucket=4096)
    assert kv_bytes(shape, 1000) == 1000 * 16 * 8 * 64 * 2 * 2
    norms = (2 * 16 + 1) * 2048
    assert shape.tape.streamed_pages * 16384 == 2 * (parameter_count(PRESETS["llama-3.2-1b"]) - norms)


def test_contexts_that_do_not_fit_are_left_out_or_refused() -> None:
    assert fitting_contexts(None, TOKENS, 131072) == list(CONTEXTS)
    assert fitting_contexts(None, TOKENS, 2048) == [32, 96, 1024]
    assert fitting_contexts([0, 1920], TOKENS, 2048) == [0, 1920]
    with pytest.raises(UserError, match="a context of 1921 and 127 tokens do not fit this model: use 0 to 1920"):
        fitting_contexts([1921], TOKENS, 2048)
    with pytest.raises(UserError, match="ask for fewer --tokens"):
        fitting_contexts(None, TOKENS, 128)


def test_a_record_s_name_says_what_it_is() -> None:
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "time": "2026-01-31T10:11:12+00:00", "commit": "0123456789ab+"}
    name = record_name({"benchmark": "decode", "model": "random:llama-3.2-1b", "machine": machine})
    assert name == "decode_h100-80gb-hbm3_llama-3.2-1b_2026-01-31_0123456789ab+.json"
    mixture = {"benchmark": "decode", "model": "random:olmoe-1b-7b", "formats": ["fp8"], "machine": machine}
    assert (
        record_name(mixture | {"zipf": 0.4}) == "decode_h100-80gb-hbm3_olmoe-1b-7b_fp8_zipf-0.4_2026-01-31_0123456789ab+.json"
    )
    assert "zipf" not in record_name(mixture | {"zipf": 0.0})
    columns = [{"context": context, "sequences": 8, "depth": 1} for context in (96, 512)]
    assert (
        record_name(mixture | {"columns": columns}) == "decode_h100-80gb-hbm3_olmoe-1b-7b_fp8_8x1_2026-01-31_0123456789ab+.json"
    )
    record = {"benchmark": "decode", "model": "a/Some Model/"}
    assert record_name(record | {"machine": machine | {"commit": None}}).endswith("_unknown.json")


def test_the_fastest_way_is_the_floor() -> None:
    floor = Floor(10, {"torch.sum": 2.0, "other": 1.5})
    assert (floor.way, floor.best) == ("other", 1.5)


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0, 2.5]) == Spread(2.5, 1.0, 9.0, [3.0, 1.0, 2.0, 9.0, 2.5])


def test_data_sheets() -> None:
    assert data_sheet_bandwidth("NVIDIA H100 80GB HBM3") == 3.35e12
    assert data_sheet_bandwidth("NVIDIA H200") == 4.8e12
    assert data_sheet_bandwidth("NVIDIA Unheard-of") is data_sheet_bandwidth(None) is None


def test_options() -> None:
    options = parser().parse_args(["--contexts", "1,20,300"])
    assert (options.contexts, options.tokens) == ([1, 20, 300], TOKENS)
    with pytest.raises(UserError, match="--contexts: invalid"):
        parser().parse_args(["--contexts", "many"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.decode"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no CUDA GPU found: this benchmark needs a GPU\n"
