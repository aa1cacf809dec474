"""Several sequences in plain PyTorch: the same bits alone and in company, what they share, and how fast they are together."""

from __future__ import annotations

import re

import pytest
import torch

from megakernel.engine import Engine
from megakernel.parts import BLOCK
from megakernel.request import SamplingParams
from megakernel.torch import backend as module
from tests.megakernel.torch.company import company
from tests.support import ROOT
from tests.support.torch_models import torch_backend

MODEL = "gqa4_llama3_tied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_depend_on_who_shares_the_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample; `python -m tests.megakernel.torch.company` compares a hundred thousand tokens."""
    monkeypatch.setattr(module, "PASS", 16)
    outcome = company(12, dtype, 400)
    assert outcome.wrong == []
    assert max(outcome.together) == 8 and sum(outcome.together.values()) > 20
    assert min(outcome.abandoned, outcome.stopped, outcome.faults, outcome.waited, outcome.logits) > 0, outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_where_rows_lie(dtype: torch.dtype) -> None:
    """Here in blocks that are scattered over the cache, there in one piece."""
    prompt, sampling = list(range(20, 20 + BLOCK + 9)), SamplingParams(temperature=1.2, seed=3)
    engine = Engine(torch_backend(MODEL, dtype))
    backend = engine._backend
    assert isinstance(backend, module.TorchBackend)
    runs = []
    for scattered in (False, True):
        if scattered:
            engine.settle()
            backend.parts.held.clear()
            odd = [engine.generate([9 + place] * (BLOCK - 2), 2, reuse=False) for place in range(7)]
            for generation in odd[:6:2]:
                generation.stop()
            engine.settle()
            backend.parts.held.clear()
        generation = engine.generate(prompt, 2 * BLOCK, sampling, reuse=False)
        [part] = list(backend.joined.values())[-1:]
        assert (len(part.runs) > 1) == scattered
        runs.append((list(generation), generation.logits().numpy().tobytes()))
    assert runs[0] == runs[1] and len(set(runs[0][0])) > BLOCK


def test_answers_to_one_prompt_read_it_once() -> None:
    """By reference: what they share lies in the same blocks."""
    engine = Engine(torch_backend(MODEL))
    backend = engine._backend
    assert isinstance(backend, module.TorchBackend)
    prompt = list(range(30, 30 + 2 * BLOCK + 3))
    generations = [engine.generate(prompt, 8, SamplingParams(temperature=1.0, seed=seed)) for seed in range(4)]
    answers = [list(generation) for generation in generations]
    assert [generation.kept for generation in generations] == [0, *[len(prompt) - 1] * 3]
    assert len({tuple(answer) for answer in answers}) == 4
    parts = [sequence.part for sequence in backend.joined]
    assert all(part[:2] == parts[0][:2] and part[2] != parts[0][2] for part in parts[1:])


def test_a_long_prompt_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for one pass of it at a time."""
    monkeypatch.setattr(module, "PASS", 4)
    engine = Engine(torch_backend(MODEL))
    first = engine.generate([50, 51], 30)
    next(first)
    told: list[tuple[int, int]] = []
    second = engine.generate(list(range(20, 50)), 4, progress=lambda *numbers: told.append(numbers))
    before = first.count
    next(second)
    assert told == [(done, 30) for done in range(4, 30, 4)] and first.count - before == 8


def test_a_cache_that_is_full_lets_wait() -> None:
    engine = Engine(torch_backend(MODEL))
    half = engine.capacity // 2
    lengths = ((5, half), (6, half), (7, half - 20))
    first, second, third = (engine.generate([number] * 3, length, reuse=False) for number, length in lengths)
    assert [one.waiting for one in (first, second, third)] == [False, True, True], "in their order"
    for generation in (first, second, third):
        assert len(list(generation)) == generation.count and generation.finish_reason == "length"


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sequences.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    *tokens, last = capsys.readouterr().out.splitlines()
    assert len(tokens) == 40 and last.endswith("] length 2"), "of the second prompt the first two tokens were there"
