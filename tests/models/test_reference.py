"""The reference is transformers' class of every family: same checkpoint file, same tokens, same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import open_checkpoint
from models.reference import Reference
from models.weights import Weights
from tests.support.configs import MAX_POSITION, SMALL_CONFIGS, make_model, save_checkpoint

TOKENS = 48
# On one machine both give the same bits; other sizes of matrix product may be summed in other orders. A chain of a few
# dozen operations, each with a relative error of a few eps = 1.2e-7 times sqrt(K) <= 33, stays below 2e-5 of the
# largest logit. A wrong RoPE pair or a missing bias shows at 1e-2 and more.
RELATIVE_TOLERANCE = 2e-5


def tokens_for(name: str, count: int = TOKENS) -> list[int]:
    vocabulary = SMALL_CONFIGS[name]["vocab_size"]
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def open_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Reference:
    checkpoint = open_checkpoint(directory)
    return Reference(checkpoint.config, Weights.collect(checkpoint.source).by_name, dtype)


@torch.no_grad()
def transformers_logits(name: str, tokens: list[int]) -> torch.Tensor:
    return make_model(name)(torch.tensor([tokens])).logits[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < RELATIVE_TOLERANCE


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = open_reference(save_checkpoint(name, tmp_path))
    tokens = tokens_for(name)
    expected = transformers_logits(name, tokens)
    assert_close(reference.logits(tokens), expected)
    reference.reset()
    pieces = [reference.extend(tokens[:1]), reference.extend(tokens[1:20]), reference.extend(tokens[20:])]
    assert_close(torch.cat(pieces), expected)


def test_whole_context_with_scaled_rope(tmp_path: Path) -> None:
    name = "head64_llama3"
    tokens = tokens_for(name, MAX_POSITION)
    reference = open_reference(save_checkpoint(name, tmp_path))
    assert_close(reference.logits(tokens), transformers_logits(name, tokens))


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    name = "gqa4_llama3_tied"
    prompt = tokens_for(name, 5)
    expected = make_model(name).generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    reference = open_reference(save_checkpoint(name, tmp_path))
    assert reference.generate(prompt, 20) == expected
    assert len(expected) > 5


def test_generation_ends_with_the_end_token(tmp_path: Path) -> None:
    reference = open_reference(save_checkpoint("mha", tmp_path))
    free = reference.generate([3, 4, 5], 12)
    end = free[6]
    ending = Reference(
        type(reference.config).from_dict({**reference.config.to_dict(), "eos_token_ids": [end]}), reference.tensors
    )
    assert ending.generate([3, 4, 5], 12) == free[: free.index(end) + 1]


@pytest.mark.parametrize("name", ["gqa2", "mistral", "qwen2_gqa7", "qwen3", "granite", "granite_biases"])
def test_bf16_rounds_where_transformers_rounds(name: str, tmp_path: Path) -> None:
    """Same operations in the same types, so nearly always the same bits; a matrix product may sum in another order."""
    import transformers

    tokens = tokens_for(name)
    reference = open_reference(save_checkpoint(name, tmp_path, torch.bfloat16), torch.bfloat16)
    # loaded, not converted: `.bfloat16()` would round transformers' RoPE frequencies as well
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].float()
    error = (reference.logits(tokens) - expected).abs().max() / expected.abs().max()
    assert error < 2**-7  # two bf16 eps on the largest logit


def test_fp64_agrees_with_fp32(tmp_path: Path) -> None:
    name = "all_biases_linear_head24"
    tokens = tokens_for(name)
    save_checkpoint(name, tmp_path)
    assert_close(open_reference(tmp_path).logits(tokens), open_reference(tmp_path, torch.float64).logits(tokens))
