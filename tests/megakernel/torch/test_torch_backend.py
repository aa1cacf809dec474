"""The plain PyTorch backend: the reference's tokens, the CPU machine's draws, passes of a prompt, faults, interrupts."""

from __future__ import annotations

import itertools

import pytest
import torch

from instructions.base import SamplingState
from instructions.sampling import draw, sampling_scores
from megakernel.backend import sampling_state
from megakernel.engine import Engine
from megakernel.errors import NotNumbers
from megakernel.loading import load_engine
from megakernel.request import SamplingParams
from megakernel.torch import backend as module
from models.checkpoint import open_checkpoint
from models.errors import MachineError
from models.reference import Reference
from models.weights import Weights
from tests.support import BUNDLED
from tests.support.decoding import decode_with_logits, vm_backend
from tests.support.torch_models import small_engine, torch_backend

TOKENS = 64
PROMPTS = ("The with statement", "A list comprehension", "import os\n", "def main(", "Python is", "x", "é ü 日本", "Return the")
MODEL = "gqa4_llama3_tied"
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
HOT = SamplingParams(temperature=1.5, seed=4)


def ids_of(text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(text).ids)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return dict(Weights.collect(open_checkpoint(BUNDLED).source, torch.float32).by_name)


def test_greedy_tokens_in_fp32_are_the_references(tensors: dict[str, torch.Tensor]) -> None:
    with load_engine(BUNDLED, "torch", dtype="float32", capacity=128) as engine:
        assert engine.backend_name == "torch"
        reference = Reference(engine.config, tensors)
        for text in PROMPTS:
            prompt = ids_of(text)
            assert list(
                engine.generate(prompt, TOKENS, SamplingParams(stop_token_ids=engine.config.eos_token_ids))
            ) == reference.generate(prompt, TOKENS), text


def test_greedy_tokens_in_bf16_are_the_references_or_near_ties(tensors: dict[str, torch.Tensor]) -> None:
    """Teacher-forced; near: bf16 moves a logit of this model by less than that, see the test of its fidelity."""
    near, others = 0.05, 0
    with load_engine(BUNDLED, "torch", capacity=128) as engine:
        reference = Reference(engine.config, {name: tensor.bfloat16() for name, tensor in tensors.items()}, torch.float32)
        for text in PROMPTS:
            prompt = ids_of(text)
            tokens = list(engine.generate(prompt, TOKENS))
            logits = reference.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
            gaps = logits.amax(1) - logits[torch.arange(TOKENS), torch.tensor(tokens)]
            others += int((gaps > 0).sum())
            assert gaps.max() < near, text
    assert others < 0.02 * TOKENS * len(PROMPTS)


SAMPLINGS = (
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.0, top_k=20, seed=2),
    SamplingParams(temperature=1.3, top_p=0.9, seed=2**40 + 3),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=4),
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
def test_the_same_seed_draws_what_the_cpu_machine_draws(dtype: torch.dtype) -> None:
    """The machine's own logits of the tokens that PyTorch drew give the same draws but for near ties, in bf16 one in fifty."""
    backend = vm_backend(BUNDLED, dtype, sms=2, capacity=128)
    others = drawn = 0
    with load_engine(BUNDLED, "torch", dtype=str(dtype).removeprefix("torch."), capacity=128) as engine:
        for text, sampling in zip(PROMPTS[: len(SAMPLINGS)], SAMPLINGS, strict=True):
            prompt = ids_of(text)
            tokens = list(engine.generate(prompt, TOKENS, sampling))
            _, logits = decode_with_logits(backend, [*prompt, *tokens[:-1]], 1)
            state, first = sampling_state(sampling), len(prompt) - 1
            machine = [machines_token(logits[first + index], state, first + index) for index in range(TOKENS)]
            others += sum(mine != its for mine, its in zip(tokens, machine, strict=True))
            drawn += TOKENS
    print(f"{dtype}: {others} of {drawn} draws are others")
    assert others <= (0 if dtype == torch.float32 else drawn / 50)


def machines_token(logits: torch.Tensor, sampling: SamplingState, position: int) -> int:
    """As the instructions `LmHead` and `Sample` choose it together."""
    return draw(logits, sampling, position) if sampling.cuts else int(sampling_scores(logits, 0, sampling, position).argmax())


def test_a_request_from_end_to_end_is_the_cpu_machines() -> None:
    """Greedy and drawn, in fp32."""
    runs = []
    for name in ("torch", "vm"):
        with small_engine(MODEL, name, 64) as engine:
            for sampling in (SamplingParams(), *SAMPLINGS):
                runs.append(list(engine.generate(PROMPT, 20, sampling)))
    half = len(runs) // 2
    assert runs[:half] == runs[half:]
    assert len({tuple(run) for run in runs}) == half, "every sampling draws something else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_cache_holds_of_a_prompt_is_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that goes on from an answer, one that leaves it at some place, the first once more, another: the same tokens."""
    monkeypatch.setattr(module, "PASS", 4)
    engine, seen = Engine(torch_backend(MODEL, dtype)), list[tuple[int, int]]()
    answer = generated(engine)
    held = (*PROMPT, *answer[:-1])  # the last token has been chosen, not read
    cases = (
        ((*PROMPT, *answer, 5, 6), len(held)),
        ((*PROMPT[:5], 77, 78), 5),
        (PROMPT, len(PROMPT) - 1),
        ((*PROMPT, *answer[:20], 5), len(PROMPT) + 20),
        ((50, 51), 0),
    )
    for prompt, kept in cases:
        generation = engine.generate(prompt, 3, reuse=True)
        reused = list(generation)
        assert generation.kept == kept
        fresh = Engine(torch_backend(MODEL, dtype))
        assert list(fresh.generate(prompt, 3, reuse=False)) == reused
    generation = engine.generate((*PROMPT, 9, 9), 1, reuse=False, progress=lambda *numbers: seen.append(numbers))
    assert len(list(generation)) == 1 and generation.kept == 0
    assert seen == [(4, 10), (8, 10)]


@pytest.mark.parametrize("size", [1, 3, len(PROMPT), 100])
def test_passes_change_no_token(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generated(Engine(torch_backend(MODEL)))
    monkeypatch.setattr(module, "PASS", size)
    assert generated(Engine(torch_backend(MODEL))) == expected


def generated(engine: Engine) -> list[int]:
    tokens = list(engine.generate(PROMPT, 30, HOT, reuse=False))
    assert len(set(tokens)) > 15
    return tokens


def test_logits_that_are_no_numbers_end_the_request_and_spoil_no_other() -> None:
    backend = torch_backend(MODEL)
    engine = Engine(backend)
    expected = generated(engine)
    embedding, poisoned = backend.model.weights.embedding, 200
    assert poisoned not in (*PROMPT, *expected)
    usual = embedding[poisoned].clone()
    embedding[poisoned] = torch.inf
    generation = engine.generate([*PROMPT, poisoned], 3)
    with pytest.raises(NotNumbers, match=f"the logits at position {len(PROMPT)} are no finite numbers"):
        next(generation)
    assert generation.steps() == [] and generation.finish_reason is None
    embedding[poisoned] = usual
    assert generated(engine) == expected


def test_what_pytorch_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = torch_backend(MODEL)

    def fails(*_: object) -> None:
        raise RuntimeError("\nnot enough memory: you tried to allocate 9 bytes\nand more")

    monkeypatch.setattr(backend.model, "logits", fails)
    engine = Engine(backend)
    generation = engine.generate(PROMPT, 3)
    expected = "decoding failed: RuntimeError: not enough memory: you tried to allocate 9 bytes; free memory or try again"
    with pytest.raises(MachineError) as caught:
        next(generation)
    assert str(caught.value) == expected


def test_an_interrupt_at_any_operation_leaves_a_usable_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prompt and after it: the next request knows nothing of it, and torch has its threads."""
    monkeypatch.setattr(module, "PASS", 3)
    backend, before = torch_backend(MODEL), torch.get_num_threads()
    engine = Engine(backend)
    expected = generated(engine)
    usual = backend.model.product.multiply
    for moment in range(0, 60, 7):
        count = itertools.count()

        def interrupted(*operands: object, count: itertools.count[int] = count, moment: int = moment) -> torch.Tensor:
            if next(count) == moment:
                raise KeyboardInterrupt
            return usual(*operands)  # type: ignore[arg-type]

        backend.model.product.multiply = interrupted
        with pytest.raises(KeyboardInterrupt):
            generated(engine)
        backend.model.product.multiply = usual
        assert torch.get_num_threads() == before
        assert generated(engine) == expected


def test_logits_are_a_copy_and_there_only_after_a_token() -> None:
    engine = Engine(torch_backend(MODEL))
    generation = engine.generate(PROMPT, 2)
    next(generation)
    with pytest.raises(RuntimeError, match="once a request is finished"):
        generation.logits()
    next(generation)
    logits = generation.logits()
    assert logits.dtype == torch.float32 and logits.shape == (engine.config.vocab_size,)
    logits.zero_()
    assert generation.logits().abs().max() > 0
    engine.generate(PROMPT, 2)
    with pytest.raises(RuntimeError, match="no longer there: another request has been asked for since"):
        generation.logits()
