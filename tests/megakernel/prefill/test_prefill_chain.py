"""The order of a chunk's launches where weights are quantised, with no GPU: tensors and tensor maps are made, nothing runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakernel.device.prefill.along import read_widened
from megakernel.device.prefill.attention import read_attention
from megakernel.device.prefill.projections import read_product
from megakernel.device.prefill.widening import widen_matrix
from megakernel.options import Sizes
from megakernel.prefill.chain import Chain, Launch
from megakernel.prefill.compile import POINTERS
from megakernel.prefill.plan import Plan
from models.formats import PLAIN, Formats
from models.packed import pack
from models.tape import PAGE_BYTES
from models.weights import Weights
from tests.support.configs import random_tensors, small_config

CAPACITY = 64
TYPES = {torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
CONFIG = replace(small_config("sixteen_queries", 128), num_layers=4)


def chain_of(formats: Formats) -> Chain:
    model = pack(Weights(random_tensors(CONFIG, seed=1)), CONFIG, torch.bfloat16, CAPACITY, formats)
    plan = Plan(CONFIG, 132, CAPACITY, formats)
    state: Any = SimpleNamespace(config=CONFIG, device=torch.device("cpu"), capacity=CAPACITY, tokens=torch.zeros(1))
    state.weights, state.constants, state.rope = model.weights, model.constants, model.rope
    state.cache = torch.zeros(64, PAGE_BYTES // 2, dtype=torch.bfloat16)
    return Chain(state, Sizes(plan.attention), plan)


def argument(launch: Launch, name: str) -> Any:
    return launch.arguments[launch.kernel.arg_names.index(name)]


@pytest.mark.parametrize("body", ["fp8", "int4", "q4_1"])
def test_every_product_reads_what_was_widened_and_nothing_else_is_overwritten(body: str) -> None:
    """Layer by layer: what each product reads, and what is widened along with it, to where."""
    chain = chain_of(Formats(body))
    tape = chain.plan.tape
    held: dict[int, tuple[int, ...]] = {}
    wanted = [tape.matrix(kind, layer) for layer in range(CONFIG.num_layers) for kind in tape.kinds]
    products = 0
    for launch in chain.launches(CAPACITY):
        if launch.kernel is read_widened:
            matrix, box = wanted[products], argument(launch, "w")
            lines = -(-matrix.columns // 64) * 16
            assert (box.shape, box.strides) == (
                [2, matrix.blocks, lines, 64],
                [matrix.blocks * lines * 64, lines * 64, 64, 1],
            )
            read = box.base.data_ptr() + 2 * argument(launch, "place") * box.strides[0]
            assert argument(launch, "layer") == matrix.layer and launch.early
            assert held[read] == (matrix.first_page, matrix.scale_offset, matrix.pages), "widened whole, before"
            products += 1
        if launch.kernel in (read_widened, widen_matrix) and argument(launch, "pages"):
            buffer = argument(launch, "widened")
            assert launch.kernel is widen_matrix or buffer.data_ptr() != read, "what is read is left alone"
            held[buffer.data_ptr()] = tuple(argument(launch, name) for name in ("first_page", "scales", "pages"))
    assert products == 4 * (CONFIG.num_layers - 1) + 1


@pytest.mark.parametrize("body", ["plain", "fp8", "int4"])
def test_every_argument_is_in_its_place(body: str) -> None:
    chain = chain_of(Formats(body))
    tensors = {"constants": chain.state.constants, "rope": chain.state.rope, "queries": chain.queries, "units": chain.units}
    tensors |= {"cache": chain.state.cache, "residual": chain.residual, "normed": chain.normed, "squares": chain.squares}
    tensors |= {"tape": chain.state.weights, "parts": chain.parts, "arrivals": chain.arrivals, "chunk": chain.words}
    for launch in chain.launches(CAPACITY):
        assert len(launch.arguments) == len(launch.kernel.arg_names)
        if launch.kernel is not read_attention:  # takes descriptors
            for name in tensors.keys() & set(launch.kernel.arg_names):
                found = argument(launch, name)
                assert (found.data_ptr(), TYPES[found.dtype]) == (tensors[name].data_ptr(), POINTERS[name]), name


def test_plain_weights_are_read_on_the_tape() -> None:
    chain = chain_of(PLAIN)
    launches = list(chain.launches(CAPACITY))
    assert not any(launch.kernel in (widen_matrix, read_widened) for launch in launches) and not chain.widened
    for launch in launches:
        if launch.kernel is read_product:
            assert argument(launch, "place") == argument(launch, "layer")
