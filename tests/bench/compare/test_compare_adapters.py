"""The adapters that run without a GPU give the reference's tokens and distributions.

In bf16, so within its error: a rounding is off by at most 2^-9 of a value, and a dozen of them on the way to a logit, all
the same way, would move it by 12 times that. A wrong position, mask or weight moves logits by their own size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.compare.adapter import Adapter, LoadSpec
from bench.compare.adapters.cuda_graph import CompiledCudaGraph, CudaGraph
from bench.compare.adapters.graph_model import FAMILIES, GraphModel
from bench.compare.adapters.ours import Megakernel
from bench.compare.adapters.transformers_compiled import TransformersCompiled
from bench.compare.adapters.transformers_eager import TransformersEager
from bench.compare.reference import continued, drawing
from models.checkpoint import open_checkpoint
from models.errors import UserError
from models.reference import Reference
from models.weights import Weights
from tests.support.compare_cases import save_small
from tests.support.configs import SMALL_CONFIGS, save_checkpoint, small_config

BF16_ERROR = 12 * 2**-9  # of the largest logit
PROMPT = [1, 17, 5, 80, 33, 9, 61]
TOKENS = 5
SPEC_CAPACITY = 64

TEACHERS = {
    "eager": TransformersEager,
    "graph": CudaGraph,
    "compiled graph": CompiledCudaGraph,
    "compiled": TransformersCompiled,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With end tokens that greedy decoding would meet: every token is one."""
    directory = save_small(tmp_path_factory.mktemp("small"))
    (directory / "generation_config.json").write_text('{"eos_token_id": ' + str(list(range(96))) + "}")
    return directory


def reference(directory: Path) -> Reference:
    checkpoint = open_checkpoint(directory)
    return Reference(checkpoint.config, Weights.collect(checkpoint.source).by_name, torch.float32)


def loaded(kind: type[Adapter], directory: Path) -> Adapter:
    adapter: Any = kind()
    if getattr(adapter, "compile_options", None):
        adapter.compile_options = {"backend": "aot_eager"}  # traced in full, but without a minute of C++ compilation
    adapter.load(LoadSpec(str(directory), SPEC_CAPACITY, 256))
    return adapter


def forced(adapter: Adapter, ids: list[int], start: int) -> np.ndarray:
    """Its distributions after every prefix from `start` tokens on."""
    return np.stack([adapter.distribution(ids[:count]) for count in range(start, len(ids) + 1)])


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("compiled graph", "compiled")]


@pytest.mark.parametrize("kind", ["eager", "graph", *SLOW])
def test_an_adapter_gives_the_reference(kind: str, small: Path) -> None:
    """Greedy tokens wherever the reference's first two logits are farther apart than bf16's error, across end tokens; the
    same tokens again; and the distributions along a given sequence."""
    adapter, judge = loaded(TEACHERS[kind], small), reference(small)
    tokens = [token for piece in adapter.generate(PROMPT, TOKENS, False) for token in piece]
    assert len(tokens) == TOKENS
    logits = judge.logits([*PROMPT, *tokens])[len(PROMPT) - 1 : -1].numpy()
    error = BF16_ERROR * float(np.abs(logits).max())
    for row, token in zip(logits, tokens, strict=True):
        assert row.max() - row[token] <= 2 * error
    assert [token for piece in adapter.generate(PROMPT, TOKENS, True) for token in piece] == tokens
    ids = [*PROMPT, 4, 95, 50]
    found = forced(adapter, ids, 3)
    assert found.dtype == np.float32
    expected = judge.logits(ids)[2:].numpy()
    assert np.abs(found - expected).max() < BF16_ERROR * np.abs(expected).max()
    assert adapter.settings() and all(isinstance(value, str) for value in adapter.settings().values())


@pytest.mark.parametrize("kind", ["eager", "graph", "ours", SLOW[-1]])
def test_prompts_together_are_as_each_alone(kind: str, small: Path) -> None:
    """Wherever the first two logits are farther apart than bf16's error; and a distribution is one sequence's."""
    adapter: Any = TEACHERS[kind]() if kind in TEACHERS else Megakernel()
    if getattr(adapter, "compile_options", None):
        adapter.compile_options = {"backend": "aot_eager"}
    adapter.load(LoadSpec(str(small), SPEC_CAPACITY, 256, batch=3))
    judge = reference(small)
    prompts = [PROMPT, [3, *PROMPT[1:]], PROMPT[::-1]]
    for prompt, tokens in zip(prompts, adapter.generate_together(prompts, TOKENS), strict=True):
        assert len(tokens) == TOKENS
        logits = judge.logits([*prompt, *tokens])[len(prompt) - 1 : -1].numpy()
        for row, token in zip(logits, tokens, strict=True):
            assert row.max() - row[token] <= 2 * BF16_ERROR * float(np.abs(logits).max())
    expected = judge.logits(PROMPT)[-1].numpy()
    assert np.abs(adapter.distribution(PROMPT) - expected).max() < BF16_ERROR * np.abs(expected).max()
    adapter.close()


def test_our_adapter_passes_on_what_weights_are_kept_as(small: Path) -> None:
    """int4 is farther from the model than bf16, and the report says how it was asked for."""
    expected = reference(small).logits(PROMPT)[-1].numpy()
    errors = []
    for options in ({}, {"weights": "int4"}):
        adapter = Megakernel(**options)
        adapter.load(LoadSpec(str(small), SPEC_CAPACITY, 256))
        errors.append(float(np.abs(adapter.distribution(PROMPT) - expected).max()))
        assert ("weights='int4'" in adapter.settings()["call"]) == bool(options)
        adapter.close()
    assert errors[1] > 3 * errors[0]


def test_our_kernels_are_known_by_name() -> None:
    import megakernel.device.kernel
    import megakernel.device.prefill.attention  # noqa: F401

    names = Megakernel().kernel_names()
    assert {"megakernel"} <= set(names) and "sum" not in names


def test_eager_streams_one_token_at_a_time(small: Path) -> None:
    adapter = loaded(TransformersEager, small)
    pieces = list(adapter.generate(PROMPT, TOKENS, True))
    assert [len(piece) for piece in pieces] == [1] * TOKENS
    assert [token for [token] in pieces] == list(adapter.generate(PROMPT, TOKENS, False))[0]


def test_our_adapter_calls_the_public_engine(small: Path) -> None:
    adapter = loaded(Megakernel, small)
    judge = reference(small)
    pieces = list(adapter.generate(PROMPT, TOKENS, False))
    assert [len(piece) for piece in pieces] == [1] * TOKENS
    logits = judge.logits([*PROMPT, *(token for [token] in pieces)])[len(PROMPT) - 1 : -1].numpy()
    for row, [token] in zip(logits, pieces, strict=True):
        assert row.max() - row[token] <= 2 * BF16_ERROR * float(np.abs(logits).max())
    assert adapter.settings()["backend"] == ("gpu" if torch.cuda.is_available() else "torch")
    adapter.close()


def is_computed(name: str) -> bool:
    return small_config(name).family in FAMILIES


@pytest.mark.parametrize("name", [name for name in SMALL_CONFIGS if is_computed(name)])
def test_the_graph_model_computes_the_network(name: str, tmp_path: Path) -> None:
    """In fp32, for every shape of attention, RoPE and bias: sums of up to 1056 products in another order, so 1e-4 is far
    above their error and far below a mistake.  The cache still holds an earlier, longer sequence."""
    judge = reference(save_checkpoint(name, tmp_path))
    model = GraphModel(judge.config, judge.tensors, SPEC_CAPACITY, torch.device("cpu"))
    ids = [token % judge.config.vocab_size for token in range(3, 25)]
    for prompt in (20, 6, 1):
        with torch.no_grad():
            model.reset()
            rows = [model.prefill(torch.tensor([ids[:prompt]]))]
            for token in ids[prompt:]:
                model.token.fill_(token)
                rows.append(model.step(32))
        expected = judge.logits(ids)[prompt - 1 :]
        assert torch.allclose(torch.cat(rows), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.history[0, : len(rows) - 1], expected[1:].argmax(-1)), "each step notes its choice"


def test_the_graph_model_decodes_several_sequences(tmp_path: Path) -> None:
    """Each as the forward pass of it alone."""
    judge = reference(save_checkpoint("mha", tmp_path))
    model = GraphModel(judge.config, judge.tensors, SPEC_CAPACITY, torch.device("cpu"), batch=3)
    sequences = torch.arange(3, 3 + 3 * 12).view(3, 12)
    for prompt in (9, 5):
        with torch.no_grad():
            model.reset()
            rows = [model.prefill(sequences[:, :prompt])]
            for place in range(prompt, 12):
                model.token.copy_(sequences[:, place])
                rows.append(model.step(32))
        found = torch.stack(rows, dim=1)  # [batch, tokens, vocabulary]
        for sequence, logits, chosen in zip(sequences, found, model.history, strict=True):
            expected = judge.logits(sequence.tolist())[prompt - 1 :]
            assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(chosen[: len(rows) - 1], expected[1:].argmax(-1))


@pytest.mark.parametrize("name", [name for name in SMALL_CONFIGS if not is_computed(name)])
def test_the_graph_model_refuses_what_it_does_not_compute(name: str) -> None:
    with pytest.raises(UserError, match="is not one that this engine computes: use one of llama, mistral, qwen2"):
        GraphModel(small_config(name), {}, SPEC_CAPACITY, torch.device("cpu"))


def test_the_reference_continues_prompts_in_pieces(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy as the forward pass of the whole, whatever pieces the prompt is read in."""
    judge = reference(small)
    tokens, logits = continued(judge, PROMPT, TOKENS, lambda row: int(row.argmax()))
    whole = judge.logits([*PROMPT, *tokens])[len(PROMPT) - 1 : -1].numpy()
    assert np.allclose(logits, whole, atol=1e-4) and tokens == list(whole.argmax(-1))
    monkeypatch.setattr("bench.compare.reference.CHUNK", 3)
    again, pieces = continued(judge, PROMPT, TOKENS, lambda row: int(row.argmax()))
    assert again == tokens and np.allclose(pieces, logits, atol=1e-4)


def test_the_reference_draws_from_its_own_distribution() -> None:
    """Probabilities 1/2, 0, 1/3, 1/6: of 3000 draws each count lies within 5 standard deviations of its mean."""
    logits = np.log(np.array([3, 1e-30, 2, 1], dtype=np.float32))
    choose = drawing(0)
    counts = np.bincount([choose(logits) for _ in range(3000)], minlength=4)
    expected = 3000 * np.array([1 / 2, 0, 1 / 3, 1 / 6])
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected)), counts
    first, again = drawing(1), drawing(1)
    assert [first(logits) for _ in range(20)] == [again(logits) for _ in range(20)]
