"""Several requests of one engine on the GPU, which has one column: they take turns, and each has its tokens as alone."""

from __future__ import annotations

import random
import threading

import pytest

from megakernel.engine import Engine, Generation
from megakernel.request import SamplingParams
from tests.support.gpu_models import random_tokens

pytestmark = pytest.mark.gpu
REQUESTS = 24


def request(number: int) -> tuple[list[int], int, SamplingParams]:
    draw = random.Random(number)
    sampling = SamplingParams(temperature=draw.choice((0.0, 1.0, 1.5)), top_k=draw.choice((0, 40)), seed=number)
    return random_tokens("bundled", draw.randrange(1, 120), seed=number), draw.randrange(1, 90), sampling


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[list[int]]:
    return [list(engine.generate(*request(number), reuse=False)) for number in range(REQUESTS)]


def test_they_take_turns(engine: Engine, alone: list[list[int]]) -> None:
    """Read in any order, all at once or token by token; who is read first waits for those before it."""
    generations = [engine.generate(*request(number), reuse=False) for number in range(REQUESTS)]
    assert [generation.waiting for generation in generations] == [False] + [True] * (REQUESTS - 1)
    draw, taken = random.Random(1), [list[int]() for _ in generations]
    steps = 0
    while any(len(mine) < len(due) for mine, due in zip(taken, alone, strict=True)):
        steps += 1
        assert steps < 10_000
        place = draw.choice([place for place, due in enumerate(alone) if len(taken[place]) < len(due)])
        taken[place] += generations[place].steps() if draw.random() < 0.5 else [next(generations[place])]
    assert taken == alone
    assert all(generation.finish_reason == "length" for generation in generations)


def test_those_that_leave_harm_nobody(engine: Engine, alone: list[list[int]]) -> None:
    """Under way or waiting, by this thread or another."""
    draw = random.Random(2)
    generations: dict[int, Generation] = {}
    leaving = set(draw.sample(range(REQUESTS), REQUESTS // 2))
    for number in range(REQUESTS):
        generations[number] = engine.generate(*request(number), reuse=False)
    for number in sorted(leaving):
        if draw.random() < 0.5:
            generations[number].stop()
    for number, due in enumerate(alone):
        if number not in leaving:
            assert list(generations[number]) == due
        elif not generations[number].ended:
            assert next(generations[number]) == due[0]
            thread = threading.Thread(target=generations[number].stop)
            thread.start()
            thread.join()
            assert generations[number].steps() == []


def test_a_long_prompt_is_read_chunk_by_chunk(engine: Engine) -> None:
    """And tells how far it is; one that leaves in the middle of it leaves no trace."""
    prompt, told = random_tokens("bundled", engine.capacity - 30, seed=3), list[tuple[int, int]]()
    due = list(engine.generate(prompt, 20, reuse=False, progress=lambda *numbers: told.append(numbers)))
    assert len(due) == 20 and [done for done, _ in told] == sorted({done for done, _ in told if done < len(prompt)})
    given_up = engine.generate(random_tokens("bundled", engine.capacity - 30, seed=4), 20, reuse=False)
    engine.step()
    given_up.stop()
    assert list(engine.generate(prompt, 20, reuse=False)) == due
