"""RoPE frequencies and the table, against transformers' modules bit for bit and against fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.config import ModelConfig, RopeScaling
from models.families import PRESETS
from models.rope import inverse_frequencies, rope_table

BASE = replace(PRESETS["llama-3.2-1b"], max_position=4096)
CASES = {
    "llama-3.2-1b": BASE,
    "llama-3-8b": PRESETS["llama-3-8b"],
    "linear": replace(BASE, rope_scaling=RopeScaling("linear", factor=4.0), rope_theta=10000.0),
    "llama3 short": replace(BASE, rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position=32), head_dim=24),
    "llama3 uneven": replace(BASE, rope_scaling=RopeScaling("llama3", 3.0, 0.5, 7.0, 100), head_dim=128),
}


def transformers_rope(config: ModelConfig) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = config.rope_scaling
    parameters: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": config.rope_theta}
    if scaling.kind != "default":
        parameters["factor"] = scaling.factor
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
        parameters["original_max_position_embeddings"] = scaling.original_max_position
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "head_dim": config.head_dim,
    }
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=parameters, max_position_embeddings=4096))


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_transformers(name: str) -> None:
    config = CASES[name]
    theirs = transformers_rope(config)
    assert torch.equal(inverse_frequencies(config), theirs.inv_freq)
    cosine, sine = theirs(torch.zeros(1), torch.arange(300)[None])
    half = config.head_dim // 2
    table = rope_table(config, 300)
    assert torch.equal(table[:, :half, 0], cosine[0, :, :half])
    assert torch.equal(table[:, :half, 1], sine[0, :, :half])


@pytest.mark.parametrize("name", CASES)
def test_every_branch_of_the_llama3_formula_is_met(name: str) -> None:
    """Otherwise the comparison above would leave one of them out."""
    config = CASES[name]
    plain = inverse_frequencies(replace(config, rope_scaling=RopeScaling()))
    ratio = (plain / inverse_frequencies(config)).numpy()
    if config.rope_scaling.kind == "llama3":
        factor = config.rope_scaling.factor
        assert (ratio == 1).any() and np.isclose(ratio, factor).any()
        assert ((ratio > 1.01) & (ratio < 0.99 * factor)).any()


def test_table_against_fp64() -> None:
    """Frequencies are rounded four times (exponent, power, reciprocal, division), their product with the position once:
    an angle of up to 299 radians errs by at most 299 * 5 * 2^-24, its cosine by no more, plus its own rounding."""
    config = CASES["linear"]
    frequencies = 10000.0 ** (-np.arange(0, 64, 2) / 64) / 4
    angles = np.arange(300)[:, None] * frequencies
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    assert np.abs(rope_table(config, 300).numpy() - expected).max() < 299 * 5 * 2**-24 + 2**-23


def test_pairs_of_padding_do_not_turn() -> None:
    table = rope_table(CASES["llama3 short"], 50)
    assert table.shape == (50, 16, 2) and table.dtype == torch.float32
    assert torch.equal(table[:, 12:], torch.tensor([1.0, 0.0]).expand(50, 4, 2))
