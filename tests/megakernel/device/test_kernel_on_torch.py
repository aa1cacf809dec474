"""The kernel's own source, run on torch (`tests.support.gluon`), beside the CPU machine: logits, tokens, caches.

Thread blocks, their roles and their copies go on in an order that a seed decides.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import pytest
import torch

from instructions.base import GREEDY, SamplingState
from megakernel.engine import Engine
from megakernel.gpu.columns import ColumnProgram, join_sequence, place_sequence
from megakernel.gpu.machine import GpuProgram, GpuState
from megakernel.gpu.sharing import SharingBackend
from megakernel.vm import DecodeState, Vm
from models.formats import PLAIN, Formats
from models.packed import PackedModel, pack
from tests.support.configs import MIXTURES
from tests.support.fake_device import fake_device
from tests.support.gluon.grid import Stuck
from tests.support.gluon.kernel import EmulatedKernel
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import CasePrograms

CAPACITY, SMS = 227, 5
BUCKETS = ((1, 1), (2, 2))  # KV pages and attention slices
EDGE = 129  # the first position of the second bucket
SAMPLED = SamplingState(temperature=0.9, top_k=0, top_p=1.0, seed=3)
CUT = SamplingState(temperature=0.9, top_k=20, top_p=0.9, seed=4)


def model_of(name: str, formats: Formats = PLAIN) -> PackedModel:
    return pack(weights_of(name), config_of(name), torch.bfloat16, CAPACITY, formats)


def programs_of(name: str, sms: int = SMS, formats: Formats = PLAIN, sequences: int = 1, depth: int = 1) -> CasePrograms:
    config = config_of(name)
    return CasePrograms(config, sms, CAPACITY, 2, formats=formats, sequences=sequences, depth=depth, buckets=BUCKETS)


class Pair:
    """One sequence on the CPU machine and on the kernel's source, from a position on whose predecessors the first decoded."""

    def __init__(
        self, name: str, first: int = 0, sms: int = SMS, formats: Formats = PLAIN, sampling: SamplingState = GREEDY
    ) -> None:
        model, self.programs = model_of(name, formats), programs_of(name, sms, formats)
        self.prompt, self.position = random_tokens(name, first + 2), first
        self.state = DecodeState(self.programs.shape(CAPACITY))
        self.state.start(self.prompt, sampling)
        self.machines = [Vm(programs_of(name, 2, formats).program(place), model, self.state) for place in range(2)]
        if first:
            self.machines[0].launch(first)
        self.device = torch.device("cpu")
        self.gpu = GpuState(model, self.programs.shape(CAPACITY).cache_pages, self.device)
        self.gpu.start(self.prompt, sampling, ())
        self.gpu.cache.copy_(torch.nan_to_num(self.state.cache.pages.flatten(1)))
        self.made: dict[int, GpuProgram] = {}

    def step(self, tokens: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode so many tokens on both; the last logits of the CPU machine, and the other's."""
        place = self.programs.place(self.position)
        if place not in self.made:
            self.made[place] = GpuProgram(self.programs.program(place), self.gpu)
        self.machines[place].launch(tokens)
        self.made[place].launch(self.position, tokens).land()
        self.position += tokens
        return self.machines[place].logits(), self.made[place].logits()


def check(wanted: torch.Tensor, found: torch.Tensor) -> None:
    """Within the rounding of some value to bf16 that a sum in another order has changed."""
    assert torch.isfinite(found).all()
    assert (wanted - found).abs().max() <= 0.02 * wanted.abs().max()
    assert wanted.argmax() == found.argmax()


@pytest.mark.parametrize(
    "name",
    [
        "gqa2",
        "qwen3_moe",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("qwen3", "granite_biases", "ragged_sizes", *MIXTURES[1:])),
    ],
)
def test_one_column(name: str) -> None:
    with fake_device(EmulatedKernel()):
        pair = Pair(name)
        check(*pair.step())
        check(*pair.step(2))
        assert pair.gpu.tokens[: pair.position + 1].tolist() == pair.state.tokens


@pytest.mark.parametrize("name", ["granitemoe", *(pytest.param(each, marks=pytest.mark.full) for each in ("mha", "olmoe"))])
def test_slices(name: str) -> None:
    """Where the second bucket begins, whose attention is combined of two slices."""
    with fake_device(EmulatedKernel(seed=1)):
        pair = Pair(name, EDGE)
        check(*pair.step())


@pytest.mark.full
def test_most_sms_have_nothing_to_do() -> None:
    with fake_device(EmulatedKernel(seed=2)):
        pair = Pair("qwen3_moe", EDGE, sms=132)
        check(*pair.step())


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("fp8", "fp8"),
        ("q4_1", "q8_0"),
        *(pytest.param(*both, marks=pytest.mark.full) for both in (("int4", "int4"), ("q4_0", "fp8"))),
    ],
)
def test_quantised_weights(body: str, head: str) -> None:
    with fake_device(EmulatedKernel()):
        pair = Pair("gqa2", formats=Formats(body, head))
        check(*pair.step())


@pytest.mark.full
@pytest.mark.parametrize("sampling", [SAMPLED, CUT], ids=["sampled", "cut"])
def test_draws(sampling: SamplingState) -> None:
    with fake_device(EmulatedKernel()):
        pair = Pair("gqa2", sampling=sampling)
        pair.step(5)
        assert pair.gpu.tokens[: pair.position + 1].tolist() == pair.state.tokens


@pytest.mark.parametrize(
    ("depth", "formats"),
    [(4, PLAIN), (2, Formats("fp8", "fp8")), (4, Formats("int4", "int4"))],
    ids=["4", "2 of fp8", "4 of int4"],
)
@pytest.mark.parametrize("first", [0, pytest.param(EDGE - 3, marks=pytest.mark.full)])
def test_columns_of_one_sequence(first: int, depth: int, formats: Formats) -> None:
    """What is left of a prompt fills them."""
    name = "gqa2"
    with fake_device(EmulatedKernel()) as cpu:
        tokens, truth = random_tokens(name, first + depth), Pair(name, first, formats=formats)
        programs = programs_of(name, formats=formats, depth=depth)
        state = GpuState(model_of(name, formats), programs.shape(CAPACITY).cache_pages, cpu)
        state.cache.copy_(truth.gpu.cache)
        state.start(tokens, GREEDY, ())
        place_sequence(state, 0, first, CAPACITY, 1)
        program = ColumnProgram(programs.program(programs.place(first)), state)
        made, [landed] = program.launch_steps(2, [first]).land()
        assert made == 2 and landed.position >= first + 2
        alone = Pair(name, first, formats=formats)
        alone.prompt = tokens
        alone.state.tokens, alone.state.prompt_length = list(tokens), len(tokens)
        alone.machines[alone.programs.place(first)].launch(landed.position - first)
        assert [*tokens[: first + 1], *landed.tokens][: len(alone.state.tokens)] == alone.state.tokens[: landed.position + 1]


def test_sequences_of_different_lengths() -> None:
    """One in the second bucket, whose attention has two slices, one in the first, and two that take no part."""
    name, sequences = "gqa2", 4
    with fake_device(EmulatedKernel(seed=3)) as cpu:
        programs, model = programs_of(name, sequences=sequences), model_of(name)
        shape = programs.shape(CAPACITY)
        assert shape.slices == 2
        state = GpuState(model, shape.cache_pages, cpu, sequences)
        truths = {1: Pair(name, EDGE), 2: Pair(name, 5)}
        for number in range(sequences):
            join_sequence(state, number, [0], GREEDY, ())
            place_sequence(state, number, 0, 0, 1)
        for number, truth in truths.items():
            pages = slice(number * shape.sequence_pages, (number + 1) * shape.sequence_pages)
            state.cache[pages].copy_(truth.gpu.cache)
            join_sequence(state, number, truth.prompt, GREEDY, ())
            place_sequence(state, number, truth.position, CAPACITY, 1 + truth.programs.place(truth.position))
        firsts = [truths[number].position if number in truths else 0 for number in range(sequences)]
        made, landed = ColumnProgram(programs.program(programs.place(EDGE)), state).launch_steps(3, firsts).land()
        assert made == 3
        for number, truth in truths.items():
            truth.machines[truth.programs.place(truth.position)].launch(3)
            assert landed[number].position == truth.position + 3
            assert [*truth.prompt, *landed[number].tokens[1:]] == truth.state.tokens


def alone(name: str, prompt: Sequence[int], tokens: int) -> list[int]:
    state = DecodeState(programs_of(name).shape(CAPACITY))
    state.start(prompt)
    Vm(programs_of(name, 2).program(0), model_of(name), state).launch(len(prompt) + tokens - 1)
    return state.generated


def test_the_engine_of_several_sequences() -> None:
    """From `Engine.generate` to the kernel's last line: two share steps, one of them ends, another joins in its slot."""
    name, requests = "gqa2", [([3, 1, 4], 3), ([1, 5], 6), ([9, 2, 6], 2)]
    with fake_device(EmulatedKernel()) as cpu:
        backend = SharingBackend(model_of(name), programs_of(name), (programs_of(name, sequences=2),), cpu)
        with Engine(backend) as engine:
            generations = [engine.generate(prompt, tokens) for prompt, tokens in requests]
            found = [list(generation) for generation in generations]
    assert found == [alone(name, prompt, tokens) for prompt, tokens in requests]


def test_a_kernel_that_cannot_go_on_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost arrival, as a fault of the kernel's source would make it."""
    from tests.support.gluon.memory import Barrier

    real, arrived = Barrier.arrive, [0]

    def arrive(barrier: Barrier, count: int = 1) -> None:
        arrived[0] += 1
        if arrived[0] != 40:
            real(barrier, count)

    monkeypatch.setattr(Barrier, "arrive", arrive)
    with fake_device(EmulatedKernel()):
        pair = Pair("gqa2")
        with pytest.raises(Stuck):
            pair.step()


def test_no_two_threads_of_a_warp_hold_what_both_have_looked_for() -> None:
    """Of values that `combine` and `attention` load themselves: a reduction would ask one of them alone."""
    combine, attention = (importlib.import_module("megakernel.device." + name) for name in ("combine", "attention"))
    for rows in (8, 16, 24, 32, 64, 80, 128, 256):
        assert combine.head_dims(rows) >= max(rows, 64) and combine.head_dims(rows) & combine.head_dims(rows) - 1 == 0
    for count in (1, 12, 32, 33, 256):
        assert attention.whole_size(count) >= max(count, 32)
