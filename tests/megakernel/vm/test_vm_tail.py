"""The tail of a prompt: the last layer and the head, from the hidden state, give the bits of the whole token.

Both go on from one state in the midst of a sequence, with a made-up cache; the whole program tells the hidden state.
"""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch

from instructions.base import Region, SamplingState
from megakernel.vm import DecodeState, Vm, VmError
from megakernel.vm.interleaving import starving
from models.packed import pack
from models.weights import Weights
from scheduler.buckets import BucketPrograms
from scheduler.program import Program
from tests.support.configs import random_tensors, small_config

CAPACITY = 384  # two buckets, and with pages of 16 KiB at least three pages a head
SMS = 5
MODELS = [
    "mha",
    "gqa8",
    "mqa_linear",
    "all_biases_linear_head24",
    "ragged_sizes",
    "wide_mlp_long_k",
    "head128_bias_tied",
    "olmoe",
]
DRAWN = SamplingState(2.0, 20, 0.9, 7)


def begun(programs: BucketPrograms, position: int, sampling: SamplingState) -> DecodeState:
    """A prompt of which all but the last token is in the cache."""
    config, random = programs.config, Random(position)
    state = DecodeState(programs.shape(CAPACITY))
    state.start([random.randrange(config.vocab_size) for _ in range(position + 1)], sampling)
    state.position = position
    state.cache.last.fill(position - 1)
    generator = torch.Generator().manual_seed(position)
    state.cache.pages.copy_(torch.randn(state.cache.pages.shape, generator=generator))
    return state


def hidden_of(whole: Vm) -> torch.Tensor:
    """The residual stream that entered the last layer in the last token."""
    config = whole.program.shape.config
    return whole.memory.read(Region("x", config.num_layers - 1, 0, config.hidden_size), whole.epoch - 1).clone()


@pytest.mark.parametrize("sampling", [SamplingState(0.0, 0, 1.0, 0), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_the_whole_token(name: str, dtype: torch.dtype, sampling: SamplingState) -> None:
    config = small_config(name, 512)
    model = pack(Weights(random_tensors(config, seed=5)), config, dtype, CAPACITY)
    programs = BucketPrograms(config, SMS, CAPACITY, dtype.itemsize)
    edge = programs.sizes[0]
    positions = (0, 1, edge, edge + 1, CAPACITY - 2)
    assert {programs.place(position) for position in positions} == {0, 1}
    tails: dict[int, Vm] = {}
    for position in positions:
        state, place = begun(programs, position, sampling), programs.place(position)
        left = copy.deepcopy(state)
        whole = Vm(programs.program(place), model, state, seed=1)
        whole.launch(1)

        left.hidden = hidden_of(whole)
        tail = tails.setdefault(place, Vm(programs.program(place, tail=True), model, seed=2))
        tail.state = left  # the epochs of the machine go on: the counters are not those of a first launch
        assert tail.launch(1) == 1
        assert left.generated == state.generated and len(left.generated) == 1
        assert torch.equal(tail.logits(), whole.logits())
        last = [s.cache.pages.unflatten(0, (config.num_layers, -1))[-1].nan_to_num() for s in (state, left)]
        assert torch.equal(*last), "keys and values of the last layer"
    assert max(tail.epoch for tail in tails.values()) > 1


def made(tail: bool = True) -> tuple[Program, Vm]:
    config = small_config("gqa2", 512)
    model = pack(Weights(random_tensors(config, seed=5)), config, torch.bfloat16, CAPACITY)
    programs = BucketPrograms(config, SMS, CAPACITY, 2)
    program = programs.program(0, tail)
    return program, Vm(program, model, begun(programs, 9, DRAWN))


def test_tokens_of_one_launch_follow_one_another() -> None:
    """No engine asks for it, as all begin with one hidden state, but the proof holds for any number of tokens."""
    _, vm = made()
    vm.state.hidden = torch.randn(vm.program.shape.config.hidden_size, generator=torch.Generator().manual_seed(1))
    states = []
    for order in [None, *(starving(sm) for sm in range(SMS))]:
        for early in (False, True):
            other = Vm(vm.program, vm.model, copy.deepcopy(vm.state), interleaving=order, early=early)
            assert other.launch(4) == 4
            states.append((other.state.generated, other.logits().numpy().tobytes()))
    assert len(states[0][0]) == 4 and all(state == states[0] for state in states)


def test_without_a_hidden_state_it_says_so() -> None:
    """A new sequence has none: what an earlier one left is not taken for it."""
    _, vm = made()
    vm.state.hidden = torch.zeros(vm.program.shape.config.hidden_size)
    vm.state.start(vm.state.tokens[:1])
    with pytest.raises(VmError, match="takes a hidden state, but none has been left"):
        vm.launch(1)
