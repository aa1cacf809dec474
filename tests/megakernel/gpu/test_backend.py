"""The GPU backend's host side, with a fake device: launches, stops, faults, and an interrupt at any line of its code."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from instructions.shape import VACANT
from megakernel.backend import shared_length
from megakernel.control_block import Control
from megakernel.engine import Engine
from megakernel.errors import NotNumbers
from megakernel.gpu import backend as backend_module
from megakernel.gpu import machine
from megakernel.gpu.backend import CHUNK, GpuBackend
from megakernel.gpu.errors import KernelFault
from megakernel.request import SamplingParams
from models.errors import MachineError
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms
from tests.support.compile_cases import MODELS
from tests.support.fake_device import FakePrefill, fake_device, next_token
from tests.support.interrupting import Interrupting

LINES = int(os.environ.get("MEGAKERNEL_INTERRUPT_LINES", "3"))  # from one line that is interrupted to the next; 1: all
SMS = 4
PROMPT = [5, 7, 11]
LENGTH = 70
CAPACITY = 512  # two context buckets


@functools.cache
def programs() -> BucketPrograms:
    return BucketPrograms(MODELS["bundled"], SMS, CAPACITY, itemsize=2)


def made_up_model() -> PackedModel:
    """Of the right sizes where the fake kernel looks."""
    config, tape = MODELS["bundled"], programs().shape(CAPACITY).tape
    pages = torch.zeros(1, tape.page_elements, dtype=torch.bfloat16)
    return PackedModel(config, torch.bfloat16, tape, pages, torch.zeros(1), torch.zeros(CAPACITY, 1, 2))


@pytest.fixture(scope="module", params=[None, FakePrefill], ids=["decoded prompts", "prefill"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with fake_device() as device, Engine(GpuBackend(made_up_model(), programs(), device, request.param), chunk=CHUNK) as made:
        yield made


def backend_of(engine: Engine) -> Any:
    return engine._backend


def generate(
    engine: Engine, tokens: int = LENGTH, stops: tuple[int, ...] = (), prompt: list[int] = PROMPT, reuse: bool = True
) -> list[int]:
    return list(engine.generate(prompt, tokens, SamplingParams(stop_token_ids=stops), reuse))


def generate_and_count(engine: Engine, tokens: int, prompt: list[int], reuse: bool = True) -> tuple[list[int], int]:
    """The tokens, and how much of the prompt was kept."""
    generation = engine.generate(prompt, tokens, reuse=reuse)
    return list(generation), generation.kept


def expected(tokens: int = LENGTH, prompt: list[int] = PROMPT) -> list[int]:
    """What the fake device's function gives, without engine or backend."""
    sequence = list(prompt)
    for _ in range(tokens):
        sequence.append(next_token(np.array(sequence, np.int32), MODELS["bundled"].vocab_size))
    return sequence[len(prompt) :]


def test_tokens_over_both_buckets(engine: Engine) -> None:
    most = CAPACITY - len(PROMPT)
    assert generate(engine, most) == expected(most)


@pytest.mark.parametrize("place", range(0, LENGTH, 3))
def test_stops(engine: Engine, place: int) -> None:
    until = expected().index(expected()[place]) + 1
    assert generate(engine, stops=(expected()[place],)) == expected()[:until]
    assert generate(engine) == expected()


@pytest.mark.parametrize("stopping", [False, True])
def test_an_interrupt_at_any_line(engine: Engine, stopping: bool) -> None:
    """Of a request that abandons one under way, decodes and, in half of the runs, stops early; the next one is right.
    Every third line, or all: see `LINES`."""
    stops = (expected()[40],) if stopping else ()
    other = PROMPT[:2] + expected(8) + expected(LENGTH)  # begins like the prompt, and then like nothing that is cached
    wanted = expected(30)
    number = 0
    while True:
        number += LINES
        abandoned = engine.generate(other, LENGTH)
        next(abandoned)
        abandoned.stop()
        try:
            with Interrupting(number, backend_module, machine) as interrupting:
                generate(engine, stops=stops)
        except KeyboardInterrupt:
            assert generate(engine, 30) == wanted, f"after an interrupt at line {number}"
            continue
        break
    assert number > interrupting.lines > 200


def test_a_fault_ends_the_request_and_no_other(engine: Engine) -> None:
    backend = backend_of(engine)
    generation = engine.generate(PROMPT, LENGTH)
    backend.program(0).result().counters[0] += 1
    with pytest.raises(KernelFault):
        list(generation)
    assert generation.steps() == [] and generation.finish_reason is None
    assert generate(engine) == expected()


def test_the_fault_of_an_abandoned_request_concerns_nobody(engine: Engine) -> None:
    backend = backend_of(engine)
    generation = engine.generate(PROMPT, LENGTH)
    next(generation)
    backend.program(0).result().counters[0] += 1
    for _ in range(CHUNK):
        next(generation)
    generation.stop()
    assert backend.flights, "a launch is under way, or the test shows nothing"
    assert generate(engine) == expected()


def test_counters_begin_anew_before_they_overflow(engine: Engine) -> None:
    program = backend_of(engine).program(0).result()
    epoch = np.iinfo(np.int32).max // int(program.program.targets.max()) - CAPACITY // 2
    generate(engine, 1)
    program.epoch = epoch
    program.counters.view(-1, machine.COUNTER_STRIDE)[:, 0] = torch.from_numpy(program.program.targets) * epoch
    assert generate(engine) == expected()
    assert program.epoch < CAPACITY


def test_positions_beyond_the_bucket_are_refused_before_the_launch(engine: Engine) -> None:
    program = backend_of(engine).program(0).result()
    last = program.program.shape.bucket
    for position, tokens in ((last, 2), (0, last + 2), (0, 0), (-1, 1)):
        with pytest.raises(ValueError, match=f"^{tokens} tokens from position {position}: .* decodes positions up to {last}$"):
            program.launch(position, tokens)
    assert generate(engine) == expected()


def test_a_program_for_another_model_or_cache_is_refused_before_the_launch(engine: Engine) -> None:
    program = backend_of(engine).program(0).result()
    shape = program.program.shape
    config = dataclasses.replace(shape.config, rms_eps=1e-3)
    for changes in ({"capacity": 2 * CAPACITY}, {"config": config}, {"itemsize": 4}):
        other = dataclasses.replace(program.program, shape=dataclasses.replace(shape, **changes))
        with pytest.raises(ValueError, match="another model, weight type or KV cache"):
            machine.check_fit(other, program.state)
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ValueError, match="another model, weight type or KV cache"),
        ):
            patch.setattr(program, "program", other)
            program.launch(0, 1)
    assert generate(engine) == expected()


def test_the_epoch_is_what_the_counter_of_the_token_s_end_says(engine: Engine) -> None:
    """Whatever number that counter has, and whoever else waits for what."""
    program = backend_of(engine).program(0).result()
    generate(engine, 5)
    end = program.program.end_counter
    counters = program.counters.view(-1, machine.COUNTER_STRIDE)[:, 0]
    assert program.program.targets[end] == 1 and int(counters[end]) == program.epoch
    program.epoch = 0
    program.resume()
    assert program.epoch == int(counters[end]) > 0


def test_a_value_that_never_comes_is_reported_with_its_reader(engine: Engine) -> None:
    """Here because its place is not vacant when the token begins; the next request begins with vacant places again."""
    program = backend_of(engine).program(0).result()
    generate(engine, 1)
    program.activations.zero_()
    expected_message = r"^the kernel was stuck at position \d+: SM 0 at #0: .* told of values, and one of them never came\. "
    with pytest.raises(KernelFault, match=expected_message):
        generate(engine)
    assert (program.activations == VACANT).all()
    assert generate(engine) == expected()


def test_the_last_program_is_that_of_the_last_token(engine: Engine) -> None:
    """Also where launches under way when a stop token came had switched to the next context bucket."""
    backend, first = backend_of(engine), programs().sizes[0]
    most = CAPACITY - len(PROMPT)
    last = first - len(PROMPT)  # the token chosen at position first - 1, still under the first program
    distinct = [place for place in range(last + 1) if expected(most).index(expected(most)[place]) == place]
    place = max(distinct)
    assert last - place < CHUNK, "a launch beyond the bucket is under way"
    generate(engine, most, stops=(expected(most)[place],))
    assert backend.last_program is backend.program(0).result()
    generate(engine, most)
    assert backend.last_program is backend.program(1).result()


def test_a_program_that_could_not_be_made_is_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(engine)
    generate(engine)
    whole = backend.programs.program
    generate(engine, CAPACITY - len(PROMPT))
    monkeypatch.setitem(backend.building.made, (1, False), backend.building.made[1, False])
    del backend.building.made[1, False]

    def failing(place: int, tail: bool) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(backend.programs, "program", failing)
    long = CAPACITY - len(PROMPT)
    with pytest.raises(MachineError) as caught:
        generate(engine, long)
    assert str(caught.value) == ("making a program failed: RuntimeError: CUDA error: out of memory; free memory or try again")
    monkeypatch.setattr(backend.programs, "program", whole)
    assert generate(engine, long) == expected(long)


def test_logits_that_are_no_numbers_end_the_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = machine.megakernel

    class Overflowing:
        arg_names = launch.names

        def __getitem__(self, grid: tuple[int]) -> Any:
            def run(*arguments: Any, **options: Any) -> None:
                control = dict(zip(launch.names, arguments, strict=True))["control"]
                control[Control.NO_NUMBERS], control[Control.STOP] = 1, len(PROMPT)

            return run

    with monkeypatch.context() as patch:
        patch.setattr(machine, "megakernel", Overflowing())
        with pytest.raises(NotNumbers, match=f"the logits at position {len(PROMPT) - 1} are no finite numbers"):
            generate(engine)
    assert generate(engine) == expected()


def test_the_kernel_is_compiled_before_the_backend_is_ready(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: a program of another bucket compiles nothing."""
    compiled: list[Any] = []
    patch = functools.partial(monkeypatch.setattr, machine.megakernel, "warmup", raising=False)
    patch(lambda *arguments, **options: compiled.append(arguments[-1]))
    backend = GpuBackend(made_up_model(), programs(), torch.device("cpu"))
    assert len(compiled) == 1
    with Engine(backend, chunk=CHUNK) as made:
        assert generate(made, CAPACITY - len(PROMPT)) == expected(CAPACITY - len(PROMPT))
    assert len(compiled) == 1


def test_a_prompt_computes_only_what_is_not_kept(engine: Engine) -> None:
    """The cache holds the prompt and what was generated, but for the last token, which nobody has looked at yet."""
    first, kept = generate_and_count(engine, 40, PROMPT, reuse=False)
    assert kept == 0
    sequence = PROMPT + first
    turns = {
        len(sequence) - 1: [*sequence, 3, 1, 4],
        20: [*sequence[:20], (sequence[20] + 1) % 50, 9],
        21: [*sequence[:20], (sequence[20] + 1) % 50, 9],  # its own last token is computed in any case
        2: [*PROMPT[:2], PROMPT[2] + 1],
        0: [PROMPT[0] + 1, *PROMPT[1:]],
    }
    for kept, prompt in turns.items():
        assert generate_and_count(engine, 1, prompt) == (expected(1, prompt), kept)
    again = [PROMPT[0] + 1, *PROMPT[1:]]
    assert generate_and_count(engine, 30, again) == (expected(30, again), len(again) - 1)
    assert generate_and_count(engine, 30, again, reuse=False) == (expected(30, again), 0)


def test_prefill_is_asked_for_the_rest_and_tells_how_far_it_is(engine: Engine) -> None:
    prefill = backend_of(engine).prefill
    if prefill is None:
        return
    generate(engine, 20, reuse=False)
    prefill.asked.clear()
    prompt = PROMPT + expected(20) + list(range(40))
    seen: list[tuple[int, int]] = []
    generation = engine.generate(prompt, 5, progress=lambda done, total: seen.append((done, total)))
    assert not seen and not prefill.asked, "nothing is computed yet"
    assert list(generation) == expected(5, prompt)
    edges = [*range(len(PROMPT) + 19, len(prompt), 16), len(prompt)]
    assert generation.kept == edges[0] and prefill.asked == list(itertools.pairwise(edges))
    assert seen == [(edge, len(prompt)) for edge in edges[1:-1]]


def test_what_is_under_way_when_a_request_is_abandoned_counts_for_nothing(engine: Engine) -> None:
    generation = engine.generate(PROMPT, LENGTH, reuse=False)
    taken = [next(generation) for _ in range(3)]
    generation.stop()
    backend = backend_of(engine)
    landed = generation.used
    assert backend.flights and taken == expected(3)
    prompt = PROMPT + expected()
    assert generate_and_count(engine, 4, prompt) == (expected(4, prompt), landed)


def test_nothing_is_kept_after_a_fault(engine: Engine) -> None:
    backend = backend_of(engine)
    generate(engine, 20)
    backend.program(0).result().counters[0] += 1
    with pytest.raises(KernelFault):
        generate(engine)
    assert generate_and_count(engine, LENGTH, PROMPT) == (expected(), 0)


def test_after_a_stop_token_the_rest_of_its_launch_is_not_kept(engine: Engine) -> None:
    until = expected().index(expected()[20]) + 1
    generate(engine, stops=(expected()[20],), reuse=False)
    prompt = PROMPT + expected()
    assert generate_and_count(engine, 4, prompt) == (expected(4, prompt), len(PROMPT) + until - 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64])
def test_the_shared_length_is_that_of_the_common_beginning(count: int) -> None:
    same = list(range(count))
    for place in range(count + 1):
        other = [*same[:place], -1, *same[place + 1 :]]
        assert shared_length(same, other) == shared_length(other, same) == place
        assert shared_length(same, same[:place]) == shared_length(same[:place], same) == place
        assert all(shared_length(same, other, most) == min(place, most) for most in range(count + 1))
