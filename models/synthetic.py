"""Made-up weights as files: a checkpoint of true shape, for what reads files, without a download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.checkpoint import INDEX_FILE
from models.config import ModelConfig
from models.hf_config import hf_values
from models.output import write_file
from models.random_weights import RandomWeights


def write_synthetic(config: ModelConfig, directory: Path, shard_limit: int) -> None:
    """Write made-up bf16 weights as a sharded checkpoint, each shard at most `shard_limit` bytes or one tensor."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 1
    for name, tensor in RandomWeights(config).tensors():
        if shard and tensor.nbytes + sum(part.nbytes for part in shard.values()) > shard_limit:
            save_file(shard, directory / f"model-{number:05d}.safetensors")
            shard, number = {}, number + 1
        shard[name] = tensor
        weight_map[name] = f"model-{number:05d}.safetensors"
    save_file(shard, directory / f"model-{number:05d}.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(config, directory)


def write_config(config: ModelConfig, directory: Path) -> None:
    """Write the configuration of a checkpoint in bf16, which some engines look for."""
    write_file(directory / "config.json", json.dumps({**hf_values(config), "dtype": "bfloat16"}))
