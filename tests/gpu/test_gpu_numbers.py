"""What is no number: left over in the cache it harms nobody, in the logits it ends the request with an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megakernel.engine import Engine
from megakernel.errors import NotNumbers
from megakernel.request import SamplingParams
from megakernel.vm.backend import VmBackend
from models.packed import PackedModel, pack
from scheduler.buckets import BucketPrograms
from tests.support.gpu_models import config_of, random_tokens, weights_of

pytestmark = pytest.mark.gpu
PROMPT = random_tokens("bundled", 6, seed=1)
LONG = 150  # beyond the first page of the cache
POISONED = 40  # a position
DRAWN = SamplingParams(temperature=1.5, top_k=40, top_p=0.9, seed=4)
OVERFLOWING = (float("nan"), float("inf"), float("-inf"), 1e38)  # as norm weights


def generate(engine: Engine, tokens: int = LONG, sampling: SamplingParams = DRAWN) -> list[int]:
    return list(engine.generate(PROMPT, tokens, sampling, reuse=False))


def state_of(engine: Engine) -> Any:
    backend: Any = engine._backend
    return backend.state


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[int]:
    return generate(engine)


@contextmanager
def norms_of(engine: Engine, value: float) -> Iterator[None]:
    """Within it, all norm weights and biases are one number: what every layer computes, K and V with it, is none."""
    constants = state_of(engine).constants
    kept = constants.clone()
    constants.fill_(value)
    torch.cuda.synchronize()
    yield
    constants.copy_(kept)
    torch.cuda.synchronize()


@pytest.mark.parametrize("value", OVERFLOWING)
def test_bad_requests_leave_numbers_in_the_cache(engine: Engine, expected: list[int], value: float) -> None:
    """One position after another, K and V of all layers, whether the request comes to its error or is abandoned before."""
    for length in (1, 5, 100, 130):
        with norms_of(engine, value):
            generation = engine.generate(random_tokens("bundled", length), 20, DRAWN)
            if length % 2:
                with pytest.raises(NotNumbers):
                    list(generation)
            generation.stop()
        assert bool(state_of(engine).cache.isfinite().all())
        assert generate(engine) == expected


def test_torn_rows(engine: Engine, expected: list[int]) -> None:
    """Any mixture of old and new bytes is a mixture of numbers, the largest ones too."""
    cache = state_of(engine).cache
    for seed in range(5):
        generator = torch.Generator(cache.device).manual_seed(seed)
        bits = cache.view(torch.int16).random_(-(2**15), 2**15, generator=generator)
        bits[~cache.isfinite()] = 0x7F7F
        torch.cuda.synchronize()
        assert generate(engine) == expected


@pytest.fixture
def poison(engine: Engine) -> Iterator[None]:
    """One position at which every number of the model is none."""
    rope = state_of(engine).rope
    kept = rope[POISONED].clone()
    rope[POISONED] = torch.nan
    torch.cuda.synchronize()
    yield
    rope[POISONED] = kept
    torch.cuda.synchronize()


@pytest.mark.parametrize("sampling", [SamplingParams(), DRAWN, SamplingParams(temperature=1.0)], ids=["greedy", "cut", "drawn"])
@pytest.mark.parametrize("prompt", [6, POISONED + 20], ids=["generated", "prompt"])
def test_logits_that_are_no_numbers(
    engine: Engine, expected: list[int], poison: None, sampling: SamplingParams, prompt: int
) -> None:
    """Of a prompt, prefill leaves the logits of the last position alone."""
    generation = engine.generate(random_tokens("bundled", prompt, seed=2), LONG, sampling, reuse=False)
    with pytest.raises(NotNumbers, match=rf"logits at position {max(POISONED, prompt - 1)} are no finite numbers"):
        list(generation)
    short = POISONED - len(PROMPT)
    assert generate(engine, short) == expected[:short], "the next request is well"


def poisoned(value: float) -> PackedModel:
    """The bundled model with one page of its tape filled with a value."""
    config = config_of("bundled")
    model = pack(weights_of("bundled"), config, torch.bfloat16, 128)
    model.weights[model.tape.matrix("down", config.num_layers - 1).first_page] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_on_both_machines(value: float) -> None:
    from megakernel.gpu.backend import GpuBackend
    from megakernel.prefill.prefill import Prefill

    model, device = poisoned(value), torch.device("cuda", 0)
    programs = BucketPrograms(model.config, 8, 128, itemsize=2)
    backends = (GpuBackend(model, programs, device), GpuBackend(model, programs, device, Prefill), VmBackend(model, programs))
    for backend in backends:
        with Engine(backend) as engine:
            generation = engine.generate(PROMPT, 4)
            with pytest.raises(RuntimeError, match=r"no finite numbers|NaN|infinite"):
                list(generation)
