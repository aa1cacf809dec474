"""What the engine promises about requests, whatever the backend: validation with numbers, counting, stopping, chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megakernel.backend import Report
from megakernel.engine import Engine, SamplingParams
from models.config import ModelConfig
from models.errors import UserError

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=50
)
CAPACITY = 20


class CountingBackend:
    """Generates 10, 11, 12, ... and remembers what it was asked."""

    name = "counting"
    config = CONFIG
    capacity = CAPACITY
    kept = 0

    def __init__(self) -> None:
        self.requests: list[tuple[list[int], int, SamplingParams]] = []
        self.asked: list[int] = []
        self.next = 0
        self.closed = 0

    def start(
        self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool = True, report: Report | None = None
    ) -> None:
        self.kept = 1 if reuse and self.requests else 0
        self.report = report
        self.requests.append((list(prompt), limit, sampling))
        self.next = 10

    def decode(self, count: int) -> list[int]:
        self.asked.append(count)
        tokens: list[int] = []
        while len(tokens) < count and not (tokens and tokens[-1] in self.requests[-1][2].stop_token_ids):
            tokens.append(self.next)
            self.next += 1
        return tokens

    def logits(self) -> torch.Tensor:
        return torch.full((CONFIG.vocab_size,), float(self.next - 1))

    def close(self) -> None:
        self.closed += 1


def test_what_is_kept_of_a_prompt_and_how_far_it_is_read() -> None:
    backend = CountingBackend()
    engine = Engine(backend)
    seen: list[tuple[int, int]] = []
    for reuse, kept in ((True, 0), (True, 1), (False, 0)):
        engine.start([1, 2, 3], 1, reuse=reuse, progress=lambda *numbers: seen.append(numbers))
        assert engine.kept == kept
    assert backend.report is not None
    backend.report(2)
    assert seen == [(2, 3)]
    engine.start([1], 1)
    assert backend.report is None


def test_a_request_runs_to_its_length() -> None:
    backend = CountingBackend()
    with Engine(backend) as engine:
        assert (engine.config, engine.capacity, engine.backend_name) == (CONFIG, CAPACITY, "counting")
        sampling = SamplingParams(temperature=0.5, top_k=3, seed=4)
        engine.start((1, 2), 3, sampling)
        assert engine.finish_reason is None
        assert [engine.step(), engine.step()] == [10, 11]
        assert engine.finish_reason is None
        assert engine.step() == 12
        assert engine.finish_reason == "length"
        assert engine.step() is None
        assert engine.finish_reason == "length"
        assert backend.requests == [([1, 2], 3, sampling)]
    assert backend.closed == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 100])
def test_tokens_do_not_depend_on_the_chunk(chunk: int) -> None:
    backend = CountingBackend()
    engine = Engine(backend, chunk=chunk)
    engine.start([1], 7)
    assert list(engine.stream()) == list(range(10, 17))
    assert engine.finish_reason == "length"
    assert sum(backend.asked) == 7 and max(backend.asked) == min(chunk, 7)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_a_stop_token_is_the_last_of_the_stream(chunk: int) -> None:
    engine = Engine(CountingBackend(), chunk=chunk)
    engine.start([1], 7, SamplingParams(stop_token_ids=(40, 12)))
    assert list(engine.stream()) == [10, 11, 12]
    assert engine.finish_reason == "stop"
    assert engine.step() is None


def test_a_stop_token_as_the_very_last_is_a_stop() -> None:
    engine = Engine(CountingBackend())
    engine.start([1], 3, SamplingParams(stop_token_ids=(12,)))
    assert list(engine.stream()) == [10, 11, 12]
    assert engine.finish_reason == "stop"


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_steps_are_the_tokens_of_one_wait_and_of_one_request(chunk: int) -> None:
    for limit, stops in ((7, ()), (7, (13,)), (19, (25,))):
        backend, taken = CountingBackend(), []
        engine = Engine(backend, chunk)
        engine.start([1], limit, SamplingParams(stop_token_ids=stops))
        expected = list(engine.stream())
        engine.start([1], limit, SamplingParams(stop_token_ids=stops))
        assert engine.step() == expected[0]
        backend.asked.clear()
        while tokens := engine.steps():
            taken.append(tokens)
        assert [token for tokens in taken for token in tokens] == expected[1:]
        assert len(taken) - len(backend.asked) in (0, 1), "what was there already is not waited for"
        assert engine.finish_reason == ("stop" if stops and expected[-1] in stops else "length") and engine.steps() == []


def test_the_models_own_end_tokens_do_not_stop_by_themselves() -> None:
    backend = CountingBackend()
    backend.config = ModelConfig(**{**CONFIG.__dict__, "eos_token_ids": (11,)})
    engine = Engine(backend)
    engine.start([1], 4)
    assert list(engine.stream()) == [10, 11, 12, 13]


def test_an_abandoned_request_leaves_a_usable_engine() -> None:
    backend = CountingBackend()
    engine = Engine(backend, chunk=3)
    engine.stop()  # nothing to abandon
    engine.start([1], 5)
    stream = engine.stream()
    assert next(stream) == 10
    engine.stop()
    assert list(stream) == [] and engine.step() is None and engine.finish_reason is None
    engine.start([2], 2)
    assert list(engine.stream()) == [10, 11]
    engine.start([3], 5)
    assert engine.step() == 10
    engine.start([4], 2)  # abandons the one before, with the tokens that were decoded already
    assert list(engine.stream()) == [10, 11]
    assert [request[0] for request in backend.requests] == [[1], [2], [3], [4]]


def test_logits_are_those_behind_the_last_token_of_a_finished_request() -> None:
    engine = Engine(CountingBackend())
    engine.start([1], 2)
    engine.step()
    with pytest.raises(RuntimeError, match="once a request is finished"):
        engine.logits()
    assert engine.step() == 11
    assert engine.logits().tolist() == [11.0] * CONFIG.vocab_size


def test_a_closed_engine_says_so() -> None:
    backend = CountingBackend()
    engine = Engine(backend)
    engine.start([1], 2)
    engine.close()
    engine.close()
    assert backend.closed == 1
    for call in (engine.step, lambda: engine.start([1], 1), lambda: list(engine.stream())):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty: give at least one token"),
        ([1, 50], 1, "prompt token 1 is 50: this model's token ids go from 0 to 49"),
        ([-1], 1, "prompt token 0 is -1: this model's token ids go from 0 to 49"),
        (["a"], 1, "prompt token 0 is 'a': token ids are integers"),
        ([1.5], 1, "prompt token 0 is 1.5: token ids are integers"),
        ([1], 0, "max_tokens is 0: ask for at least 1 token"),
        ([1], -3, "max_tokens is -3: ask for at least 1 token"),
        ([1] * 20, 1, "the prompt has 20 tokens and the context holds 20: shorten it by at least 1,"),
        ([1] * 25, 1, "the prompt has 25 tokens and the context holds 20: shorten it by at least 6,"),
        ([1] * 15, 6, "a prompt of 15 tokens and 6 more do not fit the context of 20: ask for at most 5 tokens,"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_with_the_numbers(prompt: list, max_tokens: int, message: str) -> None:
    backend = CountingBackend()
    engine = Engine(backend)
    engine.start([1], 5)
    assert engine.step() == 10
    with pytest.raises(UserError) as caught:
        engine.start(prompt, max_tokens)
    assert str(caught.value).startswith(message)
    assert len(backend.requests) == 1, "the backend hears nothing of it"
    assert engine.step() == 11, "the request before goes on"


def test_numbers_too_long_to_print_are_refused_like_others() -> None:
    engine = Engine(CountingBackend())
    with pytest.raises(UserError, match="prompt token 0 is an integer of too many digits to show: this model"):
        engine.start([10**5000], 1)
    with pytest.raises(UserError, match="an integer of too many digits to show more do not fit"):
        engine.start([1], 10**5000)


def test_a_prompt_that_just_fits() -> None:
    engine = Engine(CountingBackend())
    engine.start([1] * 15, 5)
    assert len(list(engine.stream())) == 5


@pytest.mark.parametrize("prompt", [np.array([1, 2]), torch.tensor([1, 2]), (np.int32(1), 2), range(1, 3)])
def test_any_sequence_of_integers_is_a_prompt(prompt: Sequence[int]) -> None:
    backend = CountingBackend()
    Engine(backend).start(prompt, 1)
    assert backend.requests[0][0] == [1, 2]
    assert all(type(token) is int for token in backend.requests[0][0])


def test_a_failing_backend_ends_the_request() -> None:
    backend = CountingBackend()
    engine = Engine(backend)
    engine.start([1], 3)

    def fail(count: int) -> list[int]:
        raise OSError("device lost")

    good, backend.decode = backend.decode, fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="device lost"):
        engine.step()
    backend.decode = good  # type: ignore[method-assign]
    assert engine.step() is None and engine.finish_reason is None
    engine.start([1], 1)
    assert engine.step() == 10


def test_a_backend_that_gives_nothing_is_an_error_not_an_endless_loop() -> None:
    backend = CountingBackend()
    engine = Engine(backend)
    engine.start([1], 3)
    backend.decode = lambda count: []  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="without a stop token"):
        engine.step()


def test_a_chunk_is_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="chunk is 0"):
        Engine(CountingBackend(), chunk=0)
