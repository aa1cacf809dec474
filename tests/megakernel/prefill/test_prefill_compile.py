"""Prefill's kernels compile for sm_90a with no GPU, under the oldest and the newest Triton; next to nothing spills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megakernel.prefill.launch import LAUNCH_OPTIONS, WIDENERS
from models.config import ModelConfig
from models.formats import Formats
from tests.support.compile_cases import MODELS, NEWEST, OLDEST, compiled_prefill
from tests.support.configs import small_config

Site = Callable[[str], Path]
SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper
STACK = {"qwen3-8b": 96}  # bytes a thread, outside the loop of products: what finishing whole normed heads needs,
FINISHING = 16  # and what other epilogues need
WIDE = ModelConfig(
    hidden_size=256, intermediate_size=300, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=256, vocab_size=300,
    qkv_bias=True, o_bias=True, mlp_bias=True, max_position=512,
)  # fmt: skip
CASES = {"llama-3.2-1b": MODELS["llama-3.2-1b"], "qwen3-8b": MODELS["qwen3-8b"], "wide heads, biases": WIDE}
EXPERTS = ("qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b", "granite-3.1-3b-a800m")
ROUTING = {"read_single", "read_heads", "read_choice", "read_places", "read_rows", "read_sum"}
REGISTERS, THREADS = 65536, 32 * LAUNCH_OPTIONS["num_warps"]  # of an SM; of a block
PRODUCTS = {"read_embedding", "read_attention", "read_product"}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("llama-3.2-1b", OLDEST),
        *(pytest.param(name, NEWEST, marks=[] if name == "wide heads, biases" else [pytest.mark.full]) for name in CASES),
    ],
)
def test_every_kernel(name: str, version: str, triton_site: Site) -> None:
    found = compiled_prefill(triton_site(version), CASES[name])
    assert {each["kernel"] for each in found} == PRODUCTS
    assert {each["tiling"].get("kind") for each in found} == {None, "qkv", "gate_up", "residual"}
    for each in found:
        assert each["triton"] == version
        assert each["stack"] <= STACK.get(name, FINISHING), each
        assert each["shared"] <= SHARED, each


@pytest.mark.parametrize("version", [OLDEST, pytest.param(NEWEST, marks=pytest.mark.full)])
def test_what_routes_tokens(version: str, triton_site: Site) -> None:
    """Of a small model; the experts' products are compiled with the grouped product."""
    found = compiled_prefill(triton_site(version), small_config("olmoe", 64), only=ROUTING)
    assert {each["kernel"] for each in found} == ROUTING
    for each in found:
        assert (each["stack"], each["local"]) == (0, 0) and each["shared"] <= SHARED, each


@pytest.mark.full
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_kernel_of_a_mixture(name: str, version: str, triton_site: Site) -> None:
    """All classes: no kernel that a mixture brings spills."""
    found = compiled_prefill(triton_site(version), MODELS[name])
    attention = {"read_heads", "read_single"} if MODELS[name].family == "olmoe" else {"read_single"}
    assert {each["kernel"] for each in found} == PRODUCTS | (ROUTING - {"read_heads"}) | {"read_experts"} | attention
    for each in found:
        allowed = STACK["qwen3-8b"] if each["kernel"] == "read_product" else FINISHING
        assert each["stack"] <= allowed and each["local"] == 0 and each["shared"] <= SHARED, each


@pytest.mark.parametrize(
    ("body", "version"),
    [
        ("fp8", NEWEST),
        ("int4", OLDEST),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("q8_0", OLDEST), ("q4_0", NEWEST), ("q4_1", NEWEST))),
    ],
)
def test_quantised_weights_are_widened_without_spills(body: str, version: str, triton_site: Site) -> None:
    """The smallest model: one class and few tilings."""
    found = compiled_prefill(triton_site(version), replace(WIDE, max_position=64), Formats(body))
    assert {each["kernel"] for each in found} == {"read_embedding", "read_attention", "widen_matrix", "read_widened"}
    for each in found:
        assert each["stack"] <= FINISHING and each["shared"] <= SHARED, each
        if each["kernel"] == "widen_matrix":
            assert (each["stack"], each["shared"], each["tiling"]["format"]["name"]) == (0, 0, body), each
            assert each["registers"] <= REGISTERS // (THREADS * WIDENERS), "fewer blocks fit an SM than are launched"


@pytest.mark.parametrize(("body", "version"), [("fp8", OLDEST), pytest.param("int4", NEWEST, marks=pytest.mark.full)])
def test_experts_are_widened_without_spills(body: str, version: str, triton_site: Site) -> None:
    found = compiled_prefill(triton_site(version), small_config("mixtral", 64), Formats(body), only={"widen_experts"})
    assert len(found) == 2, "gates and ups, and downs"
    for each in found:
        assert (each["stack"], each["shared"], each["tiling"]["format"]["name"]) == (0, 0, body), each
        assert each["registers"] <= REGISTERS // (THREADS * WIDENERS), "fewer blocks fit an SM than are launched"
