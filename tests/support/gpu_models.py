"""Models for the GPU tests: small ones with random weights, the bundled one, and true shapes cut to a few layers.

Kept apart from `transformers`, because worker processes import it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

from models.checkpoint import open_checkpoint
from models.config import PRESETS, ModelConfig
from models.hf_config import parse_config, read_config
from models.random_weights import RandomWeights
from models.weights import Weights, expected_tensors
from tests.support.configs import SMALL_CONFIGS

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"
SIXTEEN = {  # more query heads a KV head than the matrix instruction has columns, biases, a ragged everything
    "hidden_size": 100, "intermediate_size": 1090, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 1,
    "head_dim": 40, "vocab_size": 131, "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
LAYERS = 2  # of the true shapes


@functools.cache
def config_of(name: str) -> ModelConfig:
    """A small configuration by its name in `configs`, "sixteen_queries", "bundled", or a preset cut to two layers."""
    if name in PRESETS:
        return dataclasses.replace(PRESETS[name], num_layers=LAYERS)
    if name == "bundled":
        return read_config(BUNDLED)
    sizes = SIXTEEN if name == "sixteen_queries" else SMALL_CONFIGS[name]
    return parse_config({**sizes, "model_type": "llama", "max_position_embeddings": 512, "rms_norm_eps": 1e-5})


def weights_of(name: str) -> Weights:
    """All tensors, in bf16, so that the GPU, the CPU machine and an fp32 reference have the very same weights.

    Random matrices have a standard deviation of 1 / sqrt(K): every part of the network shows in the logits.
    """
    config = config_of(name)
    if name == "bundled":
        return Weights.collect(open_checkpoint(BUNDLED).source, torch.bfloat16)
    if name in PRESETS:
        return Weights.collect(RandomWeights(config, seed=3))
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for tensor, shape in expected_tensors(config).items():
        noise = torch.randn(shape, generator=generator)
        values = noise * shape[1] ** -0.5 if len(shape) == 2 else noise * 0.2 + ("norm" in tensor)
        tensors[tensor] = values.to(torch.bfloat16)
    return Weights(tensors)


def random_tokens(name: str, count: int, seed: int = 0) -> list[int]:
    """A prompt of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config_of(name).vocab_size, (count,), generator=generator).tolist()
