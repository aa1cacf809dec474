"""Several requests on the GPU backend with a fake device: its one column goes from one to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megakernel.engine import Engine
from megakernel.gpu.backend import CHUNK, GpuBackend
from tests.megakernel.gpu.test_backend import expected, made_up_model, programs
from tests.support.fake_device import FakePrefill, fake_device

PROMPTS = ([5, 7, 11], [3] * 40, [5, 7, 12, 1], [9])
LENGTHS = (40, 5, 1, 30)


@pytest.fixture(scope="module", params=[None, FakePrefill], ids=["decoded prompts", "prefill"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with fake_device() as device, Engine(GpuBackend(made_up_model(), programs(), device, request.param), chunk=CHUNK) as made:
        yield made


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_they_take_turns_in_whatever_order_they_are_read(engine: Engine, order: tuple[int, ...]) -> None:
    generations = [engine.generate(prompt, length) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    assert [generation.waiting for generation in generations] == [False, True, True, True]
    for place in order:
        assert list(generations[place]) == expected(LENGTHS[place], PROMPTS[place])


@pytest.mark.parametrize("taken", [0, 1, CHUNK + 1])
def test_one_that_leaves_harms_nobody(engine: Engine, taken: int) -> None:
    """Under way, with launches in flight, or waiting."""
    first, second, third = (engine.generate(PROMPTS[place], LENGTHS[place]) for place in (0, 1, 3))
    assert [next(first) for _ in range(taken)] == expected(taken, PROMPTS[0])
    first.stop()
    second.stop()
    assert list(third) == expected(LENGTHS[3], PROMPTS[3])
    assert first.steps() == second.steps() == [] and third.finish_reason == "length"


def test_logits_are_there_until_another_has_begun(engine: Engine) -> None:
    first = engine.generate(PROMPTS[0], 3)
    list(first)
    assert first.logits().shape == (engine.config.vocab_size,)
    engine.generate(PROMPTS[1], 3)
    with pytest.raises(RuntimeError, match="another request has been asked for since"):
        first.logits()
