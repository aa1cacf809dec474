"""What the engine promises about requests, whatever the backend: validation with numbers, counting, stopping, chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens

import numpy as np
import pytest
import torch

from megakernel.engine import Engine, SamplingParams
from megakernel.errors import NotNumbers
from megakernel.sequence import Sequence
from models.config import ModelConfig
from models.errors import MachineError, UserError

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=50
)
CAPACITY = 20
BAD = 49


class CountingBackend:
    """Each sequence is given 10, 11, 12, ...; remembers what it was asked.  With `pieces`, prompts are read so many tokens at a
    time; a sequence whose prompt begins with `BAD` ends at its third token, and nothing of it is to be reused."""

    name = "counting"
    config = CONFIG
    capacity = CAPACITY

    def __init__(self, columns: int = 1, pieces: int = CAPACITY) -> None:
        self.columns, self.pieces = columns, pieces
        self.requests: list[Sequence] = []
        self.joined: list[Sequence] = []
        self.asked: list[int] = []
        self.closed = 0

    def join(self, sequence: Sequence) -> bool:
        rows = sum(one.rows for one in self.joined) + sequence.rows
        if len(self.joined) == self.columns or rows > CAPACITY:
            return False
        sequence.kept = sequence.position = min(1, len(self.requests), len(sequence.prompt) - 1) * sequence.reuse
        self.requests.append(sequence)
        self.joined.append(sequence)
        return True

    def leave(self, sequence: Sequence) -> None:
        if sequence in self.joined:
            self.joined.remove(sequence)

    def decode(self, count: int) -> None:
        self.asked.append(count)
        for sequence in self.joined:
            if sequence.ended:
                continue
            sequence.position += self.pieces
            if sequence.position < len(sequence.prompt):
                continue
            done = len(sequence.tokens) - len(sequence.prompt)
            if sequence.prompt[0] == BAD and done == 2:
                sequence.position = 0
                sequence.fail(NotNumbers(done))
                continue
            sequence.take(list(range(10 + done, 10 + done + count)))

    def logits(self, sequence: Sequence) -> torch.Tensor:
        return torch.full((CONFIG.vocab_size,), float(sequence.tokens[-1]))

    def close(self) -> None:
        self.closed += 1


def test_what_is_kept_of_a_prompt_and_how_far_it_is_read() -> None:
    engine = Engine(CountingBackend(pieces=2))
    seen: list[tuple[int, int]] = []
    for reuse, kept, told in ((True, 0, [2, 4]), (True, 1, [3]), (False, 0, [2, 4])):
        generation = engine.generate([1, 2, 3, 4, 5], 1, reuse=reuse, progress=lambda *numbers: seen.append(numbers))
        assert list(generation) == [10] and generation.kept == kept
        assert seen == [(position, 5) for position in told]
        seen.clear()


def test_a_request_runs_to_its_length() -> None:
    backend = CountingBackend()
    with Engine(backend) as engine:
        assert (engine.config, engine.capacity, engine.columns, engine.backend_name) == (CONFIG, CAPACITY, 1, "counting")
        sampling = SamplingParams(temperature=0.5, top_k=3, seed=4)
        begun = time.perf_counter()
        generation = engine.generate((1, 2), 3, sampling)
        assert generation.finish_reason is None and generation.times == (0, 0)
        assert [next(generation), next(generation)] == [10, 11]
        assert generation.finish_reason is None and generation.count == 2
        assert next(generation) == 12
        assert generation.finish_reason == "length" and generation.ended
        assert begun < generation.times[0] < generation.times[1] < time.perf_counter()
        for _ in range(2):
            assert list(generation) == [] and generation.finish_reason == "length" and generation.count == 3
        [sequence] = backend.requests
        assert (sequence.prompt, sequence.limit, sequence.sampling) == ([1, 2], 3, sampling)
    assert backend.closed == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 100])
def test_tokens_do_not_depend_on_the_chunk(chunk: int) -> None:
    backend = CountingBackend()
    engine = Engine(backend, chunk=chunk)
    generation = engine.generate([1], 7)
    assert list(generation) == list(range(10, 17)) and generation.finish_reason == "length"
    assert backend.asked == [chunk] * -(-7 // chunk)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_a_stop_token_is_the_last(chunk: int) -> None:
    generation = Engine(CountingBackend(), chunk=chunk).generate([1], 7, SamplingParams(stop_token_ids=(40, 12)))
    assert list(generation) == [10, 11, 12]
    assert generation.finish_reason == "stop" and generation.steps() == []


def test_a_stop_token_as_the_very_last_is_a_stop() -> None:
    generation = Engine(CountingBackend()).generate([1], 3, SamplingParams(stop_token_ids=(12,)))
    assert list(generation) == [10, 11, 12] and generation.finish_reason == "stop"


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_steps_are_the_tokens_of_one_wait(chunk: int) -> None:
    for limit, stops in ((7, ()), (7, (13,)), (19, (25,))):
        backend, taken = CountingBackend(), []
        engine = Engine(backend, chunk)
        expected = list(engine.generate([1], limit, SamplingParams(stop_token_ids=stops)))
        generation = engine.generate([1], limit, SamplingParams(stop_token_ids=stops))
        assert next(generation) == expected[0]
        backend.asked.clear()
        while tokens := generation.steps():
            taken.append(tokens)
        assert [token for tokens in taken for token in tokens] == expected[1:]
        assert len(taken) - len(backend.asked) in (0, 1), "what was there already is not waited for"
        assert generation.finish_reason == ("stop" if stops and expected[-1] in stops else "length")


def test_the_models_own_end_tokens_do_not_stop_by_themselves() -> None:
    backend = CountingBackend()
    backend.config = ModelConfig(**{**CONFIG.__dict__, "eos_token_ids": (11,)})
    assert list(Engine(backend).generate([1], 4)) == [10, 11, 12, 13]


def test_an_abandoned_request_leaves_a_usable_engine() -> None:
    """Whether it is stopped, leaves its block, is dropped, or ended already."""
    backend = CountingBackend()
    engine = Engine(backend, chunk=3)
    generation = engine.generate([1], 5)
    assert next(generation) == 10
    generation.stop()
    assert list(generation) == [] and generation.finish_reason is None and generation.ended
    assert list(engine.generate([2], 2)) == [10, 11]
    with engine.generate([3], 5) as generation:
        assert next(generation) == 10
    for token in engine.generate([4], 5):
        assert token == 10
        break
    del generation
    waiting = engine.generate([5], 2)
    assert not waiting.waiting and list(waiting) == [10, 11]
    waiting.stop()
    assert waiting.finish_reason == "length"
    assert [sequence.prompt[0] for sequence in backend.requests] == [1, 2, 3, 4, 5]


def test_logits_are_those_behind_the_last_token_of_a_finished_request() -> None:
    generation = Engine(CountingBackend()).generate([1], 2)
    next(generation)
    with pytest.raises(RuntimeError, match="once a request is finished"):
        generation.logits()
    assert next(generation) == 11
    assert generation.logits().tolist() == [11.0] * CONFIG.vocab_size


def test_a_closed_engine_says_so() -> None:
    backend = CountingBackend(columns=2)
    engine = Engine(backend)
    generations = [engine.generate([number], 2) for number in range(3)]
    engine.close()
    engine.close()
    assert backend.closed == 1
    assert all(generation.steps() == [] and generation.finish_reason is None for generation in generations)
    for call in (engine.step, lambda: engine.generate([1], 1)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_at_once_each_with_its_own_length_and_stops(order: tuple[int, ...]) -> None:
    """To wait for one moves all on; what comes of the others waits for them, whoever is read first."""
    backend = CountingBackend(columns=3)
    engine = Engine(backend)
    limits, stops = (3, 4, 5), ((), (12,), ())
    generations = [
        engine.generate([1], limit, SamplingParams(stop_token_ids=stop)) for limit, stop in zip(limits, stops, strict=True)
    ]
    assert next(generations[order[0]]) == 10 and [generation.count for generation in generations] == [1, 1, 1]
    taken = {place: list(generations[place]) for place in order}
    taken[order[0]].insert(0, 10)
    assert [taken[place] for place in range(3)] == [[10, 11, 12], [10, 11, 12], [10, 11, 12, 13, 14]]
    assert [generation.finish_reason for generation in generations] == ["length", "stop", "length"]
    assert len(backend.asked) == 5


def test_those_beyond_the_columns_and_the_cache_wait_their_turn() -> None:
    backend = CountingBackend(columns=2)
    engine = Engine(backend)
    first, second = engine.generate([1] * 5, 6), engine.generate([2] * 3, 2)
    third, fourth, fifth = engine.generate([3] * 4, 8), engine.generate([4], 2), engine.generate([5], 1)
    assert [one.waiting for one in (first, second, third, fourth, fifth)] == [False, False, True, True, True]
    fourth.stop()
    assert second.steps() == [10] and second.steps() == [11]
    assert third.waiting and first.count == 2
    engine.settle()
    assert third.waiting, "a column is free, 10 of 20 rows of the cache are, and it needs 11"
    assert list(fifth) == [10], "the others go on, and it comes after the third"
    assert first.finish_reason is None and list(first) == list(range(10, 16))
    assert third.count and list(third) == list(range(10, 18))
    assert fourth.steps() == [] and [one.prompt[0] for one in backend.requests] == [1, 2, 3, 5]


@pytest.mark.parametrize("pieces", range(1, CAPACITY))
def test_one_that_loses_its_rows_is_no_standstill(pieces: int) -> None:
    """However many positions the others gain in the same step."""
    engine = Engine(CountingBackend(columns=2, pieces=pieces))
    good, bad = engine.generate([1], 5), engine.generate([BAD], 5)
    assert list(good) == [10, 11, 12, 13, 14] and bad.taken() == [10, 11]


def test_what_ends_one_ends_no_other() -> None:
    engine = Engine(CountingBackend(columns=3))
    good, bad, other = engine.generate([1], 5), engine.generate([BAD], 5), engine.generate([2], 4)
    assert list(good) == [10, 11, 12, 13, 14], "who waits does not hear of it"
    assert bad.taken() == [10, 11]
    with pytest.raises(NotNumbers, match="the logits at position 2"):
        next(bad)
    assert bad.steps() == [] and bad.finish_reason is None
    assert list(other) == [10, 11, 12, 13] and list(engine.generate([3], 1)) == [10]


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
    generation = engine.generate([1], 5)
    assert next(generation) == 10
    with pytest.raises(UserError) as caught:
        engine.generate(prompt, max_tokens)
    assert str(caught.value).startswith(message)
    assert len(backend.requests) == 1, "the backend hears nothing of it"
    assert next(generation) == 11, "the request before goes on"


def test_numbers_too_long_to_print_are_refused_like_others() -> None:
    engine = Engine(CountingBackend())
    with pytest.raises(UserError, match="prompt token 0 is an integer of too many digits to show: this model"):
        engine.generate([10**5000], 1)
    with pytest.raises(UserError, match="an integer of too many digits to show more do not fit"):
        engine.generate([1], 10**5000)


def test_a_prompt_that_just_fits() -> None:
    assert len(list(Engine(CountingBackend()).generate([1] * 15, 5))) == 5


@pytest.mark.parametrize("prompt", [np.array([1, 2]), torch.tensor([1, 2]), (np.int32(1), 2), range(1, 3)])
def test_any_sequence_of_integers_is_a_prompt(prompt: Tokens[int]) -> None:
    backend = CountingBackend()
    Engine(backend).generate(prompt, 1)
    assert backend.requests[0].prompt == [1, 2]
    assert all(type(token) is int for token in backend.requests[0].prompt)


def test_a_failing_backend_ends_all_that_it_decodes_and_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CountingBackend(columns=2)
    engine = Engine(backend)
    generations = [engine.generate([number], 3) for number in range(3)]

    def fail(count: int) -> None:
        raise OSError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "decode", fail)
        engine.step()
    for generation in generations[:2]:
        with pytest.raises(OSError, match="device lost"):
            next(generation)
        assert generation.steps() == [] and generation.finish_reason is None
    assert list(generations[2]) == [10, 11, 12]


@pytest.mark.parametrize("method", ["decode", "join", "leave"])
def test_an_interrupt_abandons_those_under_way(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CountingBackend(columns=2)
    engine = Engine(backend)
    generation = engine.generate([1], 3)
    assert next(generation) == 10

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backend, method, interrupt)
        if method == "leave":
            generation.stop()
        list(engine.generate([2], 3) if method == "join" else generation)
        engine.settle()
    assert generation.steps() == [] and generation.finish_reason is None
    assert list(engine.generate([3], 3)) == [10, 11, 12]
    engine.settle()
    assert backend.joined == []


def test_a_sequence_that_cannot_begin_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CountingBackend(columns=2)
    engine = Engine(backend)
    good = engine.generate([1], 2)

    def fail(sequence: Sequence) -> bool:
        raise MachineError("no memory for it")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "join", fail)
        bad = engine.generate([2], 2)
    with pytest.raises(MachineError, match="no memory for it"):
        next(bad)
    assert list(good) == [10, 11]


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [("decode", None, "has decoded nothing, and no sequence has ended"), ("join", False, "has no room for a sequence")],
)
def test_a_backend_that_gives_nothing_is_an_error_not_an_endless_loop(
    method: str, result: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CountingBackend()
    engine = Engine(backend)
    monkeypatch.setattr(backend, method, lambda _: result)
    with pytest.raises(RuntimeError, match=message):
        next(engine.generate([1], 3))


def test_a_chunk_is_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="chunk is 0"):
        Engine(CountingBackend(), chunk=0)
