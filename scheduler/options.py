"""What commands that make a program are asked for, and what is made of it: a model's configuration, the size of its cache.

Only the configuration is read, no weights.
"""

from __future__ import annotations

from pathlib import Path

from models.config import ModelConfig
from models.errors import UserError
from models.families import PRESETS
from models.hf_config import read_config
from models.locate import is_gguf, locate

RANDOM = "random:"
ITEMSIZES = {"bf16": 2, "fp32": 4}
DEFAULT_CAPACITY = 4096  # positions, where the model allows that many


def find_config(model: str) -> ModelConfig:
    """The configuration of a preset, of `random:<preset>`, of a directory with a `config.json`, or of a GGUF file."""
    preset = PRESETS.get(model.removeprefix(RANDOM))
    if preset is not None:
        return preset
    if not model:
        raise UserError(f"--model is empty: give a directory, a file or random:<preset>; the presets are {', '.join(PRESETS)}")
    if "\0" in model or model.startswith(RANDOM) or not Path(model).exists():
        raise UserError(f"{model}: neither a directory nor a preset; the presets are {', '.join(PRESETS)}")
    path = locate(model)
    if is_gguf(path):
        from models.gguf.model import open_gguf

        return open_gguf(path).config
    return read_config(path if path.is_dir() else path.parent)


def cache_capacity(config: ModelConfig, capacity: int | None) -> int:
    """The positions of the KV cache asked for, or the default; raises UserError for a number that the model cannot have."""
    limit = config.max_position
    if capacity is None:
        return min(limit, DEFAULT_CAPACITY)
    if not 1 <= capacity <= limit:
        raise UserError(f"a capacity of {capacity} tokens does not suit this model: choose 1 to {limit}")
    return capacity
