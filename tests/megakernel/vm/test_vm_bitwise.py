"""The same bits whatever happens first: every seed, adversary, placement and SM count that leaves the slices the same.

Each run goes on from position START for TOKENS tokens, across an edge of KV pages and so of attention slices.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from instructions.base import SamplingState
from megakernel.vm import DecodeState, Vm
from megakernel.vm.interleaving import Interleaving, adversaries
from scheduler.place import POLICIES
from scheduler.program import Program
from tests.support.vm_models import CAPACITY, PROMPT, TINY, outcome, packed, program, vm_of

START, TOKENS = 28, 8
FP32 = torch.float32
Outcome = tuple[list[int], bytes]


@functools.cache
def prefix(dtype: torch.dtype, slices: int) -> DecodeState:
    """The state after START tokens, decoded by one SM, one token a launch: nothing can happen at once."""
    vm = vm_of(program(sms=1, slices=slices, dtype=dtype))
    for _ in range(START):
        assert vm.launch(1) == 1
    return vm.state


def resumed(made: Program, seed: int = 0, interleaving: Interleaving | None = None) -> Vm:
    """A machine that goes on from the prefix."""
    dtype = FP32 if made.shape.itemsize == 4 else torch.bfloat16
    state = copy.deepcopy(prefix(dtype, made.shape.slices))
    return Vm(made, packed(dtype), state, seed, interleaving)


@functools.cache
def expected(dtype: torch.dtype = FP32, slices: int = 2) -> Outcome:
    """One SM, one token a launch."""
    vm = resumed(program(sms=1, slices=slices, dtype=dtype))
    for _ in range(TOKENS):
        assert vm.launch(1) == 1
    return vm.state.generated, vm.logits().numpy().tobytes()


def test_the_expected_run_is_worth_comparing_with() -> None:
    tokens, logits = expected()
    assert len(tokens) == START + TOKENS - len(PROMPT) + 1
    assert len(set(tokens)) > 5
    assert torch.isfinite(torch.frombuffer(bytearray(logits), dtype=FP32)).all()
    assert logits != expected(FP32, 1)[1], "another slicing sums in another order"
    assert START < program().shape.page_positions < START + TOKENS


@pytest.mark.parametrize("seed", range(8))
def test_every_seed(seed: int) -> None:
    assert outcome(resumed(program(sms=5), seed), TOKENS) == expected()


@pytest.mark.parametrize("number", range(7))
def test_every_adversary(number: int) -> None:
    assert outcome(resumed(program(sms=3), interleaving=adversaries(3)[number]), TOKENS) == expected()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_every_policy(policy: str, dtype: torch.dtype) -> None:
    assert outcome(resumed(program(sms=4, policy=policy, dtype=dtype), 1), TOKENS) == expected(dtype)


@pytest.mark.parametrize("sms", [2, 3, 7, 16, 33, 132])
def test_every_sm_count(sms: int) -> None:
    made = program(sms=sms)
    if sms == 132:
        assert any(len(queue) == 0 for queue in made.decoded), "some SMs have nothing to do"
    assert outcome(resumed(made, 2), TOKENS) == expected()


@pytest.mark.parametrize("ring", [4, 5, 7])
def test_every_ring_depth(ring: int) -> None:
    assert outcome(resumed(program(sms=3, ring=ring), 3), TOKENS) == expected()


def test_launches_of_any_length() -> None:
    vm = resumed(program(sms=3), 4)
    assert [vm.launch(count) for count in (1, 4, 2, 1)] == [1, 4, 2, 1]
    assert (vm.state.generated, vm.logits().numpy().tobytes()) == expected()


def test_programs_of_two_buckets_take_turns_on_one_state() -> None:
    """Both programs keep counters of their own; the cache, the tokens and the position are the state's."""
    state = copy.deepcopy(prefix(FP32, 2))
    programs = [program(sms=3, bucket=64), program(sms=3, policy="balanced", bucket=CAPACITY)]
    machines = [Vm(made, packed(), state, seed=6) for made in programs]
    for turn in range(TOKENS // 2):
        assert machines[turn % 2].launch(2) == 2
    assert (state.generated, machines[1].logits().numpy().tobytes()) == expected()


@pytest.mark.parametrize("sampling", [SamplingState(2.0, 0, 1.0, 11), SamplingState(2.0, 40, 0.9, 11)])
def test_sampling_with_a_seed_does_not_depend_on_the_schedule(sampling: SamplingState) -> None:
    def sampled(sms: int, seed: int, sampling: SamplingState) -> list[int]:
        vm = vm_of(program(sms=sms), seed=seed)
        vm.state.start(PROMPT, sampling)
        vm.launch(TOKENS + len(PROMPT))
        return vm.state.generated

    tokens = sampled(1, 0, sampling)
    assert sampled(5, 1, sampling) == sampled(16, 2, sampling) == tokens
    assert sampled(1, 0, sampling._replace(seed=12)) != tokens


def test_a_stop_token_ends_a_launch_on_every_sm() -> None:
    tokens = prefix(FP32, 2).generated
    place = next(place for place in range(3, START) if tokens[place] not in tokens[:place])
    vm = vm_of(program(sms=5), seed=7)
    vm.state.start(PROMPT, stop_tokens=[tokens[place]])
    assert vm.launch(START) == len(PROMPT) + place
    assert vm.state.generated == tokens[: place + 1]
    assert vm.state.stopped
    assert vm.launch(1) == 0, "a launch after a stop leaves at the top of its first token"


def test_a_stop_token_within_the_prompt_stops_nothing() -> None:
    first = prefix(FP32, 2).generated[0]
    assert first not in PROMPT
    vm = vm_of(program(sms=2))
    vm.state.start(PROMPT, stop_tokens=PROMPT)
    assert vm.launch(len(PROMPT)) == len(PROMPT)
    assert vm.state.generated == [first]


def test_a_new_sequence_forgets_the_one_before() -> None:
    vm = resumed(program(sms=3), 8)
    vm.launch(TOKENS)
    vm.state.start(PROMPT)
    vm.launch(START)
    assert vm.state.generated == prefix(FP32, 2).generated


def test_a_machine_refuses_what_it_was_not_made_for() -> None:
    made = program(sms=3, bucket=50)
    with pytest.raises(ValueError, match="another model or weight type"):
        Vm(made, packed(torch.bfloat16))
    with pytest.raises(ValueError, match="no prompt"):
        Vm(made, packed()).launch(1)
    vm = vm_of(made)
    assert made.shape.bucket == 64, "the bucket is rounded up to whole KV pages"
    with pytest.raises(ValueError, match="66 tokens from position 0: this program decodes positions up to 64"):
        vm.launch(66)
    with pytest.raises(ValueError, match="no logits"):
        vm.logits()
    with pytest.raises(ValueError, match="another KV cache"):
        Vm(made, packed(), DecodeState(program(sms=3, dtype=torch.bfloat16).shape))
    assert TINY.max_position > CAPACITY
