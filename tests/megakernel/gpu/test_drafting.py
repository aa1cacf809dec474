"""The backend with drafts on a fake device: the tokens of a backend without, whatever is drafted, and when it drafts."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from instructions.drafts import look_up
from megakernel.engine import Engine
from megakernel.gpu import backend as backend_module
from megakernel.gpu import columns, drafting, machine
from megakernel.gpu.backend import CHUNK
from megakernel.gpu.drafting import DraftingBackend
from megakernel.gpu.pace import HITS, OF, TRIAL, Index, Pace
from megakernel.request import SamplingParams
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms
from tests.support import fake_device as fake
from tests.support.compile_cases import MODELS
from tests.support.interrupting import Interrupting

SMS, CAPACITY, PERIOD = 4, 512, 9
LINES = int(os.environ.get("MEGAKERNEL_INTERRUPT_LINES", "6"))  # from one line that is interrupted to the next; 1: all
CONFIG = MODELS["bundled"]


@functools.cache
def programs(depth: int = 1) -> BucketPrograms:
    return BucketPrograms(CONFIG, SMS, CAPACITY, itemsize=2, depth=depth)


@functools.cache
def true_token(position: int) -> int:
    """A text that repeats itself from position 100 to 200, and nowhere else."""
    return 5 + position % PERIOD if 100 <= position < 200 else Random(position).randrange(20, CONFIG.vocab_size)


@pytest.fixture(params=[None, fake.FakePrefill], ids=["decoded prompts", "prefill"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(
        fake, "next_token", lambda rows, vocabulary: true_token(len(rows)) if vocabulary == CONFIG.vocab_size else 1
    )
    tape = programs().shape(CAPACITY).tape
    pages = torch.zeros(1, tape.page_elements, dtype=torch.bfloat16)
    model = PackedModel(CONFIG, torch.bfloat16, tape, pages, torch.zeros(1), torch.zeros(CAPACITY, 1, 2))
    with fake.fake_device() as device:
        made = DraftingBackend(model, programs(), programs(8), device, request.param)
        yield made


@pytest.mark.parametrize("prompt", [1, 3, 90, 150])
def test_the_tokens_are_those_without_drafts(backend: Any, prompt: int) -> None:
    """To the end of the capacity, over the edges of buckets, through text that repeats and text that does not."""
    with Engine(backend, chunk=CHUNK) as engine:
        for _ in range(2):
            generation = engine.generate([true_token(position) for position in range(prompt)], CAPACITY - prompt)
            assert list(generation) == [true_token(position) for position in range(prompt, CAPACITY)]
            assert generation.finish_reason == "length"
            assert 0 < generation.steps_made < CAPACITY - prompt - 30, "what repeats took fewer steps"


@pytest.mark.parametrize("stop", [101, 130, 137, 260])
def test_a_stop_token_ends_it(backend: Any, stop: int) -> None:
    token = true_token(stop)
    first = next(position for position in range(91, CAPACITY) if true_token(position) == token)
    with Engine(backend, chunk=CHUNK) as engine:
        sampling = SamplingParams(stop_token_ids=(token,))
        generation = engine.generate([true_token(position) for position in range(90)], 400, sampling)
        assert list(generation) == [true_token(position) for position in range(90, first + 1)]
        assert generation.finish_reason == "stop"
        following = engine.generate([true_token(position) for position in range(95)], 20)
        assert list(following) == [true_token(position) for position in range(95, 115)]


def test_drafts_go_on_over_the_edges_of_buckets(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches under way when one reaches its bucket's end make no step; the next bucket's begin behind them."""
    monkeypatch.setattr(fake, "next_token", lambda rows, _: 5 + len(rows) % PERIOD)
    with Engine(backend, chunk=CHUNK) as engine:
        text = [5 + position % PERIOD for position in range(CAPACITY)]
        generation = engine.generate(text[:40], CAPACITY - 40)
        assert list(generation) == text[40:]
        assert generation.steps_made < (CAPACITY - 40) // 4


@pytest.mark.parametrize("prompt", [90, 120])
def test_an_interrupt_at_any_line(backend: Any, prompt: int) -> None:
    """Of a request that abandons one under way and drafts; the next one is right.  Every sixth line, or all: see `LINES`."""
    text = [true_token(position) for position in range(200)]
    number = 0
    with Engine(backend, chunk=CHUNK) as engine:
        while True:
            number += LINES
            abandoned = engine.generate(text[:110], 60)
            next(abandoned)
            abandoned.stop()
            try:
                with Interrupting(number, backend_module, drafting, columns, machine) as interrupting:
                    list(engine.generate(text[:prompt], 50))
            except KeyboardInterrupt:
                following = engine.generate(text[: prompt + 3], 30)
                assert list(following) == text[prompt + 3 : prompt + 33], f"after an interrupt at line {number}"
                continue
            break
        assert interrupting.lines > 200


def test_text_that_does_not_repeat_is_decoded_in_one_column() -> None:
    random = Random(1)
    pace = Pace([random.randrange(10_000) for _ in range(50)])
    assert pace.drafting, "for a trial"
    pace.landed([random.randrange(10_000) for _ in range(TRIAL)], TRIAL)
    assert not pace.drafting
    for _ in range(100):
        pace.landed([random.randrange(10_000) for _ in range(CHUNK)], 0)
        assert not pace.drafting


def test_text_that_repeats_is_drafted_again() -> None:
    pace = Pace(list(range(100)))
    pace.landed([500 + i for i in range(TRIAL)], TRIAL)
    assert not pace.drafting
    pace.landed(list(range(20, 20 + OF)), 0)
    assert pace.drafting
    pace.landed(list(range(40, 40 + 3 * TRIAL)), TRIAL)
    assert pace.drafting, "three tokens a step"
    assert HITS <= OF


def test_the_host_drafts_what_the_specification_does() -> None:
    random, index, tokens = Random(2), Index(), list[int]()
    for _ in range(600):
        drafts = look_up(tokens, 1) if tokens else []
        assert index.draft() == (drafts[0] if drafts else None)
        token = random.randrange(4)
        assert index.add(token) == (drafts == [token])
        tokens.append(token)
    assert np.unique(tokens).size == 4
