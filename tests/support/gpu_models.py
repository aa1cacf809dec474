"""Models for the GPU tests: small ones with random weights, the bundled one, and true shapes cut to a few layers."""

from __future__ import annotations

import dataclasses
import functools

import torch

from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.families import PRESETS
from models.hf_config import read_config
from models.random_weights import RandomWeights
from models.weights import Weights
from tests.support import BUNDLED
from tests.support.configs import random_tensors, small_config

LAYERS = 2  # of the true shapes


@functools.cache
def config_of(name: str) -> ModelConfig:
    """A small configuration by its name in `configs`, "bundled", or a preset cut to two layers."""
    if name in PRESETS:
        return dataclasses.replace(PRESETS[name], num_layers=LAYERS)
    if name == "bundled":
        return read_config(BUNDLED)
    return small_config(name, 512)


def weights_of(name: str) -> Weights:
    """All tensors, in bf16, so that the GPU, the CPU machine and an fp32 reference have the very same weights."""
    config = config_of(name)
    if name == "bundled":
        return Weights.collect(open_checkpoint(BUNDLED).source, torch.bfloat16)
    if name in PRESETS:
        return Weights.collect(RandomWeights(config, seed=3))
    return Weights({tensor: values.to(torch.bfloat16) for tensor, values in random_tensors(config, seed=11).items()})


def random_tokens(name: str, count: int, seed: int = 0) -> list[int]:
    """A prompt of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config_of(name).vocab_size, (count,), generator=generator).tolist()
