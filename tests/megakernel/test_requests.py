"""What a request gets from a real backend, on either that needs no GPU: lengths, stop tokens, chunks, requests after others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megakernel.engine import Engine
from megakernel.request import SamplingParams
from models.errors import UserError
from tests.support.torch_models import small_engine

CAPACITY = 40
PROMPT = (7, 1, 4, 1, 5)
LONG = 20
HOT = SamplingParams(temperature=1.5, seed=4)  # many different tokens


@pytest.fixture(scope="module", params=["torch", "vm"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with small_engine("gqa2", request.param, CAPACITY) as engine:
        assert engine.backend_name == request.param
        yield engine


def generate(engine: Engine, sampling: SamplingParams = HOT, tokens: int = LONG) -> list[int]:
    return list(engine.generate(PROMPT, tokens, sampling))


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[int]:
    """What the request gives when nothing happens to it."""
    generation = engine.generate(PROMPT, LONG, HOT)
    tokens = list(generation)
    assert len(tokens) == LONG and len(set(tokens)) > LONG // 2 and generation.finish_reason == "length"
    return tokens


def stopping_at(*tokens: int) -> SamplingParams:
    return SamplingParams(temperature=HOT.temperature, seed=HOT.seed, stop_token_ids=tokens)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("place", [0, 1, 7, LONG - 1])
def test_a_stop_token_ends_the_request_wherever_it_comes(
    engine: Engine, expected: list[int], place: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_chunk", chunk)
    stop = expected[place]
    generation = engine.generate(PROMPT, LONG, stopping_at(stop))
    assert list(generation) == expected[: expected.index(stop) + 1]
    assert generation.finish_reason == "stop" and generation.steps() == []
    assert generate(engine) == expected, "the next request knows nothing of it"


def test_a_stop_token_in_the_prompt_does_not_stop(engine: Engine, expected: list[int]) -> None:
    assert PROMPT[0] not in expected
    assert generate(engine, stopping_at(PROMPT[0])) == expected


def test_abandoned_requests_leave_no_trace(engine: Engine, expected: list[int]) -> None:
    for taken in (0, 1, 5):
        generation = engine.generate([9, 8], 30, SamplingParams(temperature=2.0, seed=taken))
        for _ in range(taken):
            next(generation)
        generation.stop()
        assert generate(engine) == expected


def test_another_seed_draws_other_tokens(engine: Engine, expected: list[int]) -> None:
    assert generate(engine, SamplingParams(temperature=1.5, seed=5)) != expected


def test_a_request_of_exactly_the_capacity_in_one_and_in_two(engine: Engine) -> None:
    tokens = generate(engine, HOT, CAPACITY - len(PROMPT))
    assert len(PROMPT) + len(tokens) == CAPACITY
    assert list(engine.generate([*PROMPT, *tokens[:9]], len(tokens) - 9, HOT)) == tokens[9:]


def test_one_token_more_is_refused(engine: Engine, expected: list[int]) -> None:
    with pytest.raises(UserError, match=f"do not fit the context of {CAPACITY}"):
        engine.generate(PROMPT, CAPACITY - len(PROMPT) + 1)
    assert generate(engine) == expected


def test_logits_are_what_the_last_token_was_chosen_from(engine: Engine) -> None:
    generation = engine.generate(PROMPT, LONG, SamplingParams())
    tokens, logits = list(generation), generation.logits()
    assert logits.dtype == torch.float32 and logits.shape == (engine.config.vocab_size,)
    assert int(logits.argmax()) == tokens[-1]
