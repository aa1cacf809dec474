"""The network in plain PyTorch against the reference, on small models of every kind: fp32 and bf16, at once and by tokens."""

from __future__ import annotations

import pytest
import torch

from megakernel.torch import model as torch_model_module
from megakernel.torch import product
from models.reference import Reference
from tests.support.configs import SMALL_CONFIGS, small_config
from tests.support.torch_models import logits_in_passes, rounded, torch_model

POSITIONS = 70
SIZES = (POSITIONS, 1, 32)  # of a pass: all at once, token by token, an edge of passes in between


def tokens_of(name: str, count: int = POSITIONS) -> list[int]:
    return torch.randint(SMALL_CONFIGS[name]["vocab_size"], (count,), generator=torch.Generator().manual_seed(7)).tolist()


def reference_logits(name: str, weights: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Weights that the first type holds, computed in the second."""
    return Reference(small_config(name), rounded(name, weights), dtype).logits(tokens_of(name)).float()


def fp32_tolerance(name: str, logits: torch.Tensor) -> float:
    """Rounding of sums of K products, on both sides: see `tests.megakernel.test_small_models`."""
    sizes = SMALL_CONFIGS[name]
    widest = max(sizes["hidden_size"], sizes["intermediate_size"])
    return 2 * (4 * sizes["num_hidden_layers"] + 1) * widest**0.5 * 2**-24 * float(logits.abs().max())


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_fp32_logits_are_the_references_within_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model_module, "SCORES", 200 * SMALL_CONFIGS[name]["num_attention_heads"])  # attention in pieces
    expected = reference_logits(name, torch.float32, torch.float32)
    model = torch_model(name, torch.float32)
    for size in SIZES:
        assert (logits_in_passes(model, tokens_of(name), size) - expected).abs().max() <= fp32_tolerance(name, expected)


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) at every position, nats, fp64 [positions]."""
    p, q = (torch.log_softmax(values.double(), -1) for values in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_bf16_is_no_further_from_fp32_than_the_references_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference rounds where transformers does."""
    monkeypatch.setattr(product, "WIDENED", 1000)  # matrices in several pieces
    exact = reference_logits(name, torch.bfloat16, torch.float32)
    theirs = reference_logits(name, torch.bfloat16, torch.bfloat16)
    model = torch_model(name, torch.bfloat16)
    their_divergence = divergence(exact, theirs)
    for size in SIZES:
        ours = logits_in_passes(model, tokens_of(name), size)
        our_divergence = divergence(exact, ours)
        if small_config(name).num_experts:  # rounding may send a token to another expert, on either side: not so half of them
            assert 0 < our_divergence.median() <= their_divergence.median(), size
            continue
        assert 0 < our_divergence.mean() <= their_divergence.mean(), size
        assert our_divergence.max() <= their_divergence.max(), size
        # Token by token products are rounded as theirs are: the largest of all errors may fall to either side.
        assert (ours - exact).abs().max() <= (1.25 if size == 1 else 1) * (theirs - exact).abs().max(), size


def test_what_an_earlier_sequence_left_in_the_cache_is_not_read() -> None:
    model = torch_model("gqa4_llama3_tied", torch.float32)
    first = logits_in_passes(model, tokens_of("gqa4_llama3_tied"), 32)
    model.cache.rows.fill_(torch.nan)
    assert torch.equal(logits_in_passes(model, tokens_of("gqa4_llama3_tied"), 32), first)


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_widened_weights_give_the_product_in_fp32(rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of 100 products of numbers that bf16 holds, wherever the matrix is cut."""
    monkeypatch.setattr(product, "WIDENED", 300)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(count, 100, generator=generator).bfloat16() for count in (rows, tokens))
    exact = x.double() @ weight.double().T
    assert (product.Widening()(weight, x, True) - exact).abs().max() < 100 * 2**-24 * exact.abs().max()


def test_devices_that_round_a_bf16_product_are_found() -> None:
    """PyTorch has no such product on a CPU."""
    assert not product.gives_fp32(torch.bfloat16, torch.device("cpu"))
