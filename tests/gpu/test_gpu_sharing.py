"""The product's engine with several sequences on the GPU: each has the tokens that it has alone, whoever joins and leaves."""

from __future__ import annotations

import functools
import os
import time
from random import Random

import pytest
import torch

from bench.rig import programs_of
from megakernel.engine import Engine, Generation
from megakernel.gpu.backend import CHUNK, GpuBackend
from megakernel.gpu.sharing import SharingBackend
from megakernel.prefill.prefill import Prefill
from megakernel.request import SamplingParams
from models.packed import PackedModel, pack
from scheduler.buckets import BucketPrograms
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import ITEMSIZE

pytestmark = pytest.mark.gpu
NAME = "bundled"
TOKENS = int(os.environ.get("MEGAKERNEL_SHARED_TOKENS", "6000"))  # 100,000 on demand


@functools.cache
def model() -> PackedModel:
    return pack(weights_of(NAME), config_of(NAME), torch.bfloat16, config_of(NAME).max_position)


def alone() -> Engine:
    return Engine(GpuBackend(model(), programs_of(model()), torch.device("cuda", 0), Prefill), chunk=CHUNK)


def together(columns: tuple[int, ...] = (2, 4, 8)) -> Engine:
    one = programs_of(model())
    shared = tuple(BucketPrograms(one.config, one.sms, one.capacity, ITEMSIZE, sequences=count) for count in columns)
    return Engine(SharingBackend(model(), one, shared, torch.device("cuda", 0), Prefill), chunk=CHUNK)


def requests(seed: int, tokens: int) -> list[tuple[list[int], int, SamplingParams, int]]:
    """Prompts, lengths, samplings, and after how many tokens each is abandoned, until so many tokens are asked for."""
    draw, made = Random(seed), list[tuple[list[int], int, SamplingParams, int]]()
    while tokens > 0:
        prompt = random_tokens(NAME, draw.randrange(1, 200), seed=len(made))
        length = draw.randrange(1, min(120, config_of(NAME).max_position - len(prompt)))
        temperature, top_k, top_p = draw.choice(((0.0, 0, 1.0), (0.9, 0, 1.0), (0.8, 40, 0.9)))
        sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=len(made))
        made.append((prompt, length, sampling, draw.choice((length, length, length, draw.randrange(1, length + 1)))))
        tokens -= length
    return made


def test_random_joins_and_leaves() -> None:
    """Without reuse, so that a prompt is read as it is alone."""
    asked, begun = requests(1, TOKENS), time.perf_counter()
    with alone() as engine:
        wanted = [list(engine.generate(prompt, length, sampling, reuse=False)) for prompt, length, sampling, _ in asked]
    draw, running, number, most = Random(2), dict[Generation, tuple[int, list[int]]](), 0, 0
    with together() as engine:
        while number < len(asked) or running:
            if number < len(asked) and len(running) < 10 and draw.random() < 0.4:
                prompt, length, sampling, _ = asked[number]
                running[engine.generate(prompt, length, sampling, reuse=False)] = number, []
                number += 1
            engine.step()
            most = max(most, len(running))
            for generation, (place, found) in tuple(running.items()):
                found += generation.taken()
                if generation.ended or len(found) >= asked[place][3]:
                    assert found == wanted[place][: len(found)], f"request {place}"
                    generation.stop()
                    del running[generation]
    print(
        f"{sum(map(len, wanted))} tokens of {len(asked)} sequences, up to {most} at once, {time.perf_counter() - begun:.0f} s"
    )
    assert most >= 8


def test_answers_to_one_prompt_and_the_next_turn() -> None:
    """The prompt is read once; what is kept serves, and a chat goes on while others decode."""
    prompt = random_tokens(NAME, 150, seed=3)
    samplings = [SamplingParams(temperature=0.8, seed=seed) for seed in range(5)]
    with together() as engine:
        generations = [engine.generate(prompt, 40, sampling) for sampling in samplings]
        answers = [list(generation) for generation in generations]
        assert [generation.kept for generation in generations] == [0, *[149] * 4]
        assert len({tuple(answer) for answer in answers}) > 1
        again = [list(engine.generate(prompt, 40, sampling)) for sampling in samplings[1:]]
        assert again == answers[1:], "the same from the same kept rows"
        turn = engine.generate(prompt + answers[4] + [5, 6], 20)  # the first answer's slot is the fourth of these
        others = [engine.generate(random_tokens(NAME, 20, seed=seed), 60) for seed in range(3)]
        assert len(list(turn)) == 20 and turn.kept >= 189
        assert [len(list(other)) for other in others] == [60] * 3


def test_one_alone_has_the_program_of_one_column() -> None:
    prompt = random_tokens(NAME, 30, seed=4)
    with alone() as engine:
        wanted = list(engine.generate(prompt, 100))
    with together((2,)) as engine:
        generation = engine.generate(prompt, 100)
        assert list(generation) == wanted
        assert torch.isfinite(generation.logits()).all()
