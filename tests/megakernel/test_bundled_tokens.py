"""The bundled model on the CPU machine writes what transformers writes: 20 prompts, 64 tokens each, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from megakernel.loading import load_engine
from tests.support.decoding import decode_with_logits, generated_by_transformers, vm_backend

BUNDLED = Path(models.__path__[0]) / "bundled"
TOKENS = 64
PROMPTS = (
    "The with statement",
    "A list comprehension",
    "import os\n",
    "def main(",
    "Python is",
    "The quick brown fox",
    "Exceptions are raised when",
    "class Foo:",
    "If you want to",
    "The following example shows",
    "Return the",
    "A generator is a function that",
    "0123456789",
    "Changed in version 3.",
    "é ü 日本",
    "Note that the",
    "for i in range(10):",
    "Deprecated since",
    "The module provides",
    "x",
)
GROUPS = 4  # of prompts, so that test processes can share them


def ids_of(text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(text).ids)


@pytest.fixture(scope="module")
def reference() -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, *(pytest.param(group, marks=pytest.mark.full) for group in range(1, GROUPS))])
def test_greedy_tokens_in_fp32_are_those_of_transformers(group: int, reference: Any) -> None:
    with load_engine(BUNDLED, "vm", sms=2, dtype="float32", capacity=128) as engine:
        for text in PROMPTS[group::GROUPS]:
            prompt = ids_of(text)
            tokens = list(engine.generate(prompt, TOKENS))
            assert tokens == generated_by_transformers(reference, prompt, TOKENS), text


def test_bf16_is_no_further_from_fp32_than_transformers_bf16(reference: Any) -> None:
    """KL divergence from fp32 and largest error of a logit, over the positions of one text."""
    import transformers

    prompt = ids_of("The with statement is used to wrap the execution of a block with methods defined by a context manager.")
    backend = vm_backend(BUNDLED, torch.bfloat16, sms=4, capacity=128)
    tokens, ours = decode_with_logits(backend, prompt, 32)
    theirs_model = transformers.LlamaForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact, theirs = (
            model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0].float() for model in (reference, theirs_model)
        )
    p, q_ours, q_theirs = (torch.log_softmax(logits.double(), -1) for logits in (exact, ours, theirs))
    our_kl, their_kl = ((p.exp() * (p - q)).sum(-1) for q in (q_ours, q_theirs))
    assert our_kl.mean() <= their_kl.mean() and our_kl.max() <= their_kl.max()
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    assert float(our_kl.mean()) > 0, "bf16 rounds somewhere, or this compares nothing"
