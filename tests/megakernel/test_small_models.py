"""The CPU machine against transformers, on small models of every kind: tokens in fp32, logits in fp32 and bf16.

Contexts cross every edge of context buckets and attention slices within POSITIONS.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megakernel.engine import Engine
from megakernel.vm.backend import VmBackend
from scheduler import buckets, build
from tests.support.configs import MAX_POSITION, SMALL_CONFIGS, make_model, save_checkpoint
from tests.support.decoding import decode_with_logits, generated_by_transformers, vm_backend

# Larger ones, and those of which another of the same family is left.
LARGER = {
    "ragged_sizes", "head128_bias_tied", "wide_mlp_long_k", "sixteen_queries", "all_biases_linear_head24", "head_not_derived",
    "qwen3", "mistral", "granite", "head64_llama3", "mha", "gqa2", "qwen3_head24_bias", "head24_odd_blocks",
}  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.full) if name in LARGER else name for name in SMALL_CONFIGS]
PROMPT, GENERATED = 104, 40
POSITIONS = PROMPT + GENERATED
BF16_POSITIONS = 48


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint directory by model name and dtype, written once."""

    @functools.cache
    def written(name: str, dtype: torch.dtype) -> Path:
        return save_checkpoint(name, tmp_path_factory.mktemp(name), dtype)

    return written


@pytest.fixture(autouse=True)
def near_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of 1, 2, 4, ... KV pages and a slice for every page, so that short contexts cross their edges."""
    for name, pages in (("FIRST_PAGES", 1), ("SECOND_PAGES", 2), ("GROWTH", 2)):
        monkeypatch.setattr(buckets, name, pages)
    monkeypatch.setattr(build, "SLICE_PAGES", 1)


def sms_of(name: str) -> int:
    """SMs for a slice each of every K/V head: 2 where heads are so narrow that two KV pages hold the context, else 4."""
    sizes = SMALL_CONFIGS[name]
    return sizes["num_key_value_heads"] * (2 if sizes["head_dim"] <= 32 else 4)


def tokens_of(name: str, count: int) -> list[int]:
    vocabulary = SMALL_CONFIGS[name]["vocab_size"]
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def fp32_tolerance(name: str, logits: torch.Tensor) -> float:
    """How far two fp32 computations of the same logits may lie apart.

    A sum of K products carries a rounding error of about sqrt(K) * 2^-24 of its terms' norm (Higham and Mary, 2019), and the
    errors of the 4 matrix products of every layer, and of the head, reach the logits.  Both sides have them: a factor of 2.
    """
    sizes = SMALL_CONFIGS[name]
    widest = max(sizes["hidden_size"], sizes["intermediate_size"])
    return 2 * (4 * sizes["num_hidden_layers"] + 1) * widest**0.5 * 2**-24 * float(logits.abs().max())


def assert_crosses_edges(backend: VmBackend) -> None:
    """The context went through an edge of KV pages, of context buckets and of slices."""
    last = backend.last_machine.program.shape
    assert last.page_positions < POSITIONS - 1 and len(backend.machines) > 1
    filled = [first < stop for first, stop in (last.slice_range(index, POSITIONS - 1) for index in range(last.slices))]
    assert sum(filled) >= 2


@torch.no_grad()
def transformers_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("name", NAMES)
def test_fp32_tokens_are_transformers_and_logits_within_rounding(name: str, checkpoint_of: Any) -> None:
    backend = vm_backend(checkpoint_of(name, torch.float32), torch.float32, sms=sms_of(name), capacity=MAX_POSITION)
    # the edges of attention, which mixtures share with others, are crossed by those
    prompt_length, generated = (24, 12) if is_mixture(name) else (PROMPT, GENERATED)
    prompt = tokens_of(name, prompt_length)
    tokens, logits = decode_with_logits(backend, prompt, generated)
    model = make_model(name)
    assert tokens == generated_by_transformers(model, prompt, generated)
    expected = transformers_logits(model, [*prompt, *tokens[:-1]])
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) <= fp32_tolerance(name, expected)
    if not is_mixture(name):
        assert_crosses_edges(backend)


def is_mixture(name: str) -> bool:
    return "num_experts_per_tok" in SMALL_CONFIGS[name]


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) at every position, nats, fp64 [positions]."""
    p, q = (torch.log_softmax(values.double(), -1) for values in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_no_further_from_fp32_than_transformers_bf16(name: str, checkpoint_of: Any) -> None:
    """Reference: the bf16 checkpoint computed in fp32.  Compared over BF16_POSITIONS positions of the same tokens."""
    import transformers

    directory = checkpoint_of(name, torch.bfloat16)
    tokens = tokens_of(name, BF16_POSITIONS)
    backend = vm_backend(directory, torch.bfloat16, sms=sms_of(name), capacity=BF16_POSITIONS + 1)
    _, ours = decode_with_logits(backend, tokens, 1)
    reference, theirs = (
        transformers_logits(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval(), tokens)
        for dtype in (torch.float32, torch.bfloat16)
    )
    our_kl, their_kl = divergence(reference, ours), divergence(reference, theirs)
    if is_mixture(name):  # rounding may send a token to another expert, here or there: seldom
        assert our_kl.median() <= their_kl.median()
        return
    assert our_kl.mean() <= their_kl.mean()
    assert our_kl.max() <= their_kl.max()
    assert (ours - reference).abs().max() <= (theirs - reference).abs().max()


def test_chunks_seeds_and_policies_change_no_token(checkpoint_of: Any) -> None:
    """One engine after another, each over an edge of context buckets."""
    directory, prompt = checkpoint_of("head128", torch.bfloat16), tokens_of("head128", 60)
    runs = []
    for chunk, seed, policy in ((1, 0, "balanced"), (7, 1, "round_robin"), (100, 2, "critical_path")):
        backend = vm_backend(directory, torch.bfloat16, sms=3, capacity=MAX_POSITION, policy=policy, seed=seed)
        with Engine(backend, chunk) as engine:
            runs.append((list(engine.generate(prompt, 20)), backend.last_machine.logits().numpy().tobytes()))
            assert len(backend.machines) > 1
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0][0])) > 10
