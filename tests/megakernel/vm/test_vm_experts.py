"""Chosen experts on the CPU machine: the same bits in every order, and programs that take the wrong pages, or too early."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from instructions.base import PageSource
from instructions.expert_gate_up import ExpertGateUp
from megakernel.vm import Vm, VmError
from megakernel.vm.interleaving import adversaries, loaders_first
from models.formats import Formats
from models.packed import numbers, pack
from models.random_weights import RandomWeights
from models.reference import Reference
from models.weights import Weights
from scheduler.build import build_program, make_shape
from scheduler.program import Program
from tests.mutations.draft import Draft
from tests.support.configs import random_tensors, small_config
from tests.support.vm_models import CAPACITY, PROMPT, outcome, program, vm_of

NAMES = ("qwen3_moe", "olmoe")
TOKENS = 8


@pytest.mark.parametrize("name", NAMES)
def test_order_of_steps_and_cut_over_sms_change_no_bit(name: str) -> None:
    config = small_config(name, 512)
    first = outcome(vm_of(program(3, config=config)), TOKENS)
    for order in adversaries(3):
        assert outcome(vm_of(program(3, config=config), interleaving=order, early=True), TOKENS) == first
    assert outcome(vm_of(program(7, config=config, ring=4)), TOKENS) == first
    assert outcome(vm_of(program(1, "balanced", config=config)), TOKENS) == first


def test_tokens_choose_different_experts() -> None:
    """Else the tests here would show nothing: of 8 experts 3 a token, and not the same."""
    config = small_config("qwen3_moe", 512)
    vm = vm_of(program(3, config=config))
    seen = []
    for _ in range(4):
        vm.launch(1)
        buffer = vm.program.shape.buffers["choice"]
        seen.append(tuple(vm.memory.values[buffer.base : buffer.base + 3].int().tolist()))
    assert all(len(set(chosen)) == 3 and set(chosen) <= set(range(8)) for chosen in seen)
    assert len(set(seen)) > 1


def test_equal_scores_choose_the_lower_numbers() -> None:
    config = small_config("qwen3_moe", 512)
    tensors = random_tensors(config, seed=5)
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"].zero_()
    vm = vm_of(program(3, config=config))
    vm.model = pack(Weights(tensors), config, torch.float32, CAPACITY)
    vm.launch(1)
    base = vm.program.shape.buffers["choice"].base
    assert vm.memory.values[base : base + 6].tolist() == pytest.approx([0, 1, 2, 1 / 3, 1 / 3, 1 / 3])


def unwaited(made: Program) -> Program:
    """The same program, but no loader waits before it looks for a choice."""
    draft = Draft.of(made)
    for site in draft.sites(lambda item: item.load_wait and item.instruction.selects(made.shape)):
        draft.change(site, load_wait=None)
    found = draft.program()
    assert found is not None
    return found


def test_a_choice_that_is_looked_at_too_early_is_a_fault() -> None:
    """With a loader that runs a token ahead, the place still holds the choice of the token before the last."""
    config = dataclasses.replace(small_config("qwen3_moe", 512), num_layers=1)
    made = program(13, "round_robin", config=config, slices=1)
    vm = vm_of(unwaited(made), interleaving=loaders_first())
    with pytest.raises(VmError, match=r"looks at row .* of choice\[0\]"):
        vm.launch(4)
    vm_of(made, interleaving=loaders_first()).launch(4)


def test_pages_of_experts_that_were_not_chosen_are_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that streams another expert's pages: whoever multiplies by them has NaN."""
    config = small_config("qwen3_moe", 512)
    right = ExpertGateUp.page_source
    calls: list[int] = []

    def wrong_once(item: ExpertGateUp, *arguments: Any) -> PageSource | None:
        source = right(item, *arguments)
        calls.append(1)
        return PageSource("tape", source.index + 1) if source and len(calls) == 1 else source

    monkeypatch.setattr(ExpertGateUp, "page_source", wrong_once)
    with pytest.raises(VmError, match="writes NaN to expert_mlp") as caught:
        vm_of(program(3, config=config)).launch(1)
    assert caught.value.instruction.startswith("expert_gate_up")


@pytest.mark.parametrize("body", ["fp8", "q4_1"])
def test_quantised_experts_are_those_of_the_reference(body: str) -> None:
    """Their scales come with the chosen experts' pages; routers stay plain."""
    config = small_config("qwen3_moe", 512)
    formats = Formats(body, "plain")
    model = pack(RandomWeights(config), config, torch.bfloat16, CAPACITY, formats)
    shape = make_shape(config, sms=3, capacity=CAPACITY, bucket=CAPACITY, itemsize=2, slices=1, formats=formats)
    vm = Vm(build_program(shape, 3), model)
    vm.state.start(PROMPT)
    vm.launch(len(PROMPT))
    expected = Reference(*numbers(model)).logits(PROMPT)[-1]
    error = (vm.logits() - expected).abs().max() / expected.abs().max()
    assert error < 2**-5
