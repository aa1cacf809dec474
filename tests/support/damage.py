"""Small checkpoints to damage: how to write a sound one, how to break it, and what a refusal looks like."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from models.errors import UserError
from models.hf_config import parse_config
from models.random_weights import RandomWeights
from tests.support.configs import SMALL_CONFIGS

VALUES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SMALL_CONFIGS["gqa2"],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_single(directory: Path, values: dict[str, Any] = VALUES) -> None:
    directory.joinpath("config.json").write_text(json.dumps(values))
    save_file(dict(RandomWeights(parse_config(VALUES)).tensors()), directory / SINGLE_FILE)


def write_shards(directory: Path) -> None:
    directory.joinpath("config.json").write_text(json.dumps(VALUES))
    tensors = dict(RandomWeights(parse_config(VALUES)).tensors())
    names = list(tensors)
    parts = {FIRST: names[:9], SECOND: names[9:]}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / shard)
    write_index(directory, {name: shard for shard, part in parts.items() for name in part})


def write_index(directory: Path, weight_map: Any) -> None:
    directory.joinpath(INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(directory: Path) -> dict[str, str]:
    return json.loads(directory.joinpath(INDEX_FILE).read_text())["weight_map"]


def refused(model: str | Path) -> str:
    """The one line of the refusal."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save a file anew after `change` edited its tensors in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a file with the JSON header that `change` edited in place, or with the text that it returned."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(header: dict[str, Any]) -> None:
    """Two tensors of one size at one place."""
    header["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = header["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]


def twice(header: dict[str, Any]) -> str:
    text = json.dumps(header)
    return text[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}"


def past_the_end(header: dict[str, Any]) -> None:
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"])
    last["shape"][0] += 1
    last["data_offsets"][1] += 2 * math.prod(last["shape"][1:])
