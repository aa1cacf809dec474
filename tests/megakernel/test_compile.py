"""The real kernel compiles for Hopper, with no GPU, for every model and under both supported ends of Triton's versions.

No spills, no stack, shared memory within what a thread block may have.  Registers are reported (`pytest -rP`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megakernel.geometry import pages_bytes
from models.config import ModelConfig
from models.formats import Formats
from scheduler.limits import RESERVED, RESERVED_QUANTISED, SHARED_MEMORY
from tests.support import ROOT
from tests.support.compile_cases import MODELS, NEWEST, OLDEST, SMS, compiled, geometry_of

Site = Callable[[str], Path]
REGISTERS = 64 * 1024  # of one SM
WARP = 32
WORKER_WARPS = 4  # the loader's single warp is rounded up to a warp group

pytestmark = pytest.mark.slow


def both_versions(*names: str) -> list[Any]:
    """These models under both versions; one process takes both of a model (tests/conftest.py): its program is built once."""
    return [pytest.param(name, version, id=f"{name}-{version}") for name in names for version in (OLDEST, NEWEST)]


def check(found: dict[str, Any], version: str, stack: int = 0) -> None:
    from megakernel.options import WARPS

    print(found)
    assert found["triton"] == version
    assert (found["stack"], found["local"]) <= (stack, 0), "registers are spilled"
    assert found["shared"] <= SHARED_MEMORY
    assert found["registers"] * WARP * (WARPS + WORKER_WARPS) <= REGISTERS, "the block does not fit an SM"


# Presets that differ in more than sizes from one that is here are.  The first two under both Tritons; of the others each under
# one, for each takes some ten seconds.  The stack is what docs/notebook/records.md knows of.
COMPILED = ("llama-3.2-1b", "bundled")
UNDER_ONE = {
    "llama-3.2-3b": NEWEST, "llama-3-8b": OLDEST, "smollm2-135m": OLDEST, "mistral-7b": OLDEST, "qwen2.5-7b": OLDEST,
    "granite-8b-code": NEWEST, "qwen3-0.6b": NEWEST, "qwen3-8b": NEWEST, "granite-3.3-8b": NEWEST,
}  # fmt: skip
STACK = {"smollm2-135m": 8} | dict.fromkeys(("llama-3-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "granite-3.3-8b"), 16)


ALIKE = {
    "llama-3.2-3b",
    "mistral-7b",
    "qwen2.5-7b",
    "granite-8b-code",
    "granite-3.3-8b",
    "qwen3-0.6b",
}  # all but sizes are another's


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *both_versions(*COMPILED),
        *(pytest.param(*case, marks=[pytest.mark.full] if case[0] in ALIKE else []) for case in UNDER_ONE.items()),
    ],
)
def test_every_family(name: str, version: str, triton_site: Site) -> None:
    geometry = geometry_of(MODELS[name])
    found = compiled(triton_site(version), geometry)
    check(found, version, STACK.get(name, 0))
    assert 0 <= found["shared"] - pages_bytes(geometry) <= RESERVED, "the ring and the staged activations are in that figure"


def test_biases_odd_heads_and_sixteen_queries_a_head(triton_site: Site) -> None:
    """What none of the presets has: a head of 40 dimensions, 16 query heads sharing one, biases, ragged sizes."""
    config = ModelConfig(
        hidden_size=100, intermediate_size=1090, num_layers=1, num_heads=16, num_kv_heads=1, head_dim=40, vocab_size=131,
        qkv_bias=True, o_bias=True, mlp_bias=True, max_position=512,
    )  # fmt: skip
    geometry = geometry_of(config, sms=7)
    assert (geometry.group_columns, geometry.head_rows) == (16, 48)
    assert min(matrix.bias.first for matrix in (geometry.qkv, geometry.o, geometry.gate_up, geometry.down)) >= 0
    check(compiled(triton_site(OLDEST), geometry), OLDEST)


@pytest.mark.parametrize("name", ["olmoe-1b-7b", pytest.param("qwen3-30b-a3b", marks=pytest.mark.full)])
def test_chosen_experts(triton_site: Site, name: str) -> None:
    """Router, choice, experts, queries that are normed together, and halves of pages; of two layers, for the code does not
    depend on how many."""
    geometry = geometry_of(replace(MODELS[name], num_layers=2))
    assert geometry.experts.chosen == 8 and geometry.norms_together == (not geometry.experts.down_halved)
    found = compiled(triton_site(OLDEST), geometry)
    check(found, OLDEST)
    assert 0 <= found["shared"] - pages_bytes(geometry) <= RESERVED


@pytest.mark.parametrize(
    ("body", "head", "version"),
    [
        ("int4", "fp8", OLDEST),
        ("q4_1", "q8_0", NEWEST),
        pytest.param("q8_0", "q4_0", OLDEST, marks=pytest.mark.full),
        pytest.param("q4_0", "q8_0", NEWEST, marks=pytest.mark.full),
    ],
)
def test_quantised_weights(body: str, head: str, version: str, triton_site: Site) -> None:
    """Formats that are widened in registers, two in one kernel: the layers in one and the head in the other."""
    geometry = geometry_of(MODELS["llama-3.2-1b"], formats=Formats(body, head))
    assert geometry.head_apart
    found = compiled(triton_site(version), geometry)
    check(found, version, STACK.get(f"{body}-{head}", 0))
    assert 0 <= found["shared"] - pages_bytes(geometry) <= RESERVED_QUANTISED


def test_a_spill_would_be_seen(triton_site: Site) -> None:
    """The same kernel, held to too few registers: the report must say that it needs a stack."""
    found = compiled(triton_site(OLDEST), geometry_of(MODELS["bundled"]), maxnreg=64)
    assert found["stack"] > 0
    with pytest.raises(AssertionError, match="spilled"):
        check(found, OLDEST)


def test_the_command_prints_one_line_of_json(triton_site: Site) -> None:
    argv = [sys.executable, "-m", "megakernel.compile", "--model", str(ROOT / "models" / "bundled"), "--past", "2000"]
    environment = os.environ | {"PYTHONPATH": str(triton_site(OLDEST))}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sms"] == SMS
    assert found["slices"] > 1
    check(found, OLDEST)


def test_a_model_that_is_not_there_is_one_clear_line() -> None:
    argv = [sys.executable, "-m", "megakernel.compile", "--model", "no/such/model"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no/such/model: ")
    assert done.stderr.count("\n") == 1
