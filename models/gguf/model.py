"""Opens a model in GGUF: everything that its headers tell is checked before a tensor is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from models.config import ModelConfig
from models.errors import UserError
from models.files import open_regular
from models.formats import PLAIN_NAME, Formats
from models.gguf.blocks import format_for
from models.gguf.config import ROPE_FACTORS, architecture_of, hf_config, hf_name
from models.gguf.file import GgufFile, read_gguf
from models.gguf.header import Tensor
from models.gguf.weights import GgufSource, Place, read_tensor, stored_dtype
from models.hf_config import parse_config
from models.rope import inverse_frequencies
from models.weights import EMBEDDING, HEAD, expected_tensors

_MOST_FACTORS = 2**12  # of a head's dimensions, by pairs


@dataclass(frozen=True)
class GgufModel:
    """A checked model: see `models.checkpoint.Checkpoint`."""

    file: GgufFile
    config: ModelConfig
    source: GgufSource
    stored_dtype: torch.dtype
    formats: Formats


def open_gguf(path: Path) -> GgufModel:
    """Open a file, with its other parts where it was split.

    Raises `UserError` naming the file and the tensor at fault: no tensor may be missing, left over, of a wrong shape, or of a
    type that cannot be read.
    """
    file = read_gguf(path)
    try:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        config = parse_config(hf_config(file.values, shapes, lambda: _rope_factors(file.tensors[ROPE_FACTORS])))
        inverse_frequencies(config)
        halves = architecture_of(file.values).halves
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    places = _places(file, config, halves)
    [embedding] = (place for place in places if place.name == EMBEDDING)
    formats, places = _kept(places, config)
    return GgufModel(file, config, GgufSource(places), stored_dtype(embedding.tensor), formats)


def _kept(places: tuple[Place, ...], config: ModelConfig) -> tuple[Formats, tuple[Place, ...]]:
    """What matrices are kept as, and the places with that: those of the layers as a format that holds the blocks of all of
    them, the head as one that holds its own.

    Where heads are padded, the columns of those who read them are in no blocks: then the layers' matrices are widened.
    """
    head = EMBEDDING if config.tied_embeddings else HEAD
    body = {place.tensor.kind.name for place in places if _of_layers(place)}
    padded = config.padded_head_dim != config.head_dim
    of_body = None if padded else format_for(body)
    of_head = format_for({place.tensor.kind.name for place in places if place.name == head})
    formats = Formats(*(PLAIN_NAME if format is None else format.name for format in (of_body, of_head)))
    found = (replace(p, format=of_head if p.name == head else of_body if _of_layers(p) else None) for p in places)
    return formats, tuple(found)


def _of_layers(place: Place) -> bool:
    """Whether it is a matrix of a layer."""
    return len(place.tensor.shape) == 2 and place.name not in (EMBEDDING, HEAD)


def _places(file: GgufFile, config: ModelConfig, halves: bool) -> tuple[Place, ...]:
    """Where each tensor of the network lies: none missing, none left over, every shape and type as it must be."""
    pending, places = expected_tensors(config), []
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if halves else {}
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS:
            continue
        name = hf_name(tensor.name)
        shape = pending.pop(name, None) if name else None
        if name is None or shape is None:
            raise UserError(f"{tensor.path}: tensor {tensor.name} is left over, this model has none such: take another file")
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, but its keys make it {list(shape)}: "
                "take it from a sound model"
            )
        stored_dtype(tensor)
        places.append(Place(name, tensor, heads.get(name.rpartition(".")[0].rpartition(".")[2], 0)))
    if pending:
        first = next(iter(pending))
        raise UserError(f"{file.path}: tensor {first} is missing, with {len(pending) - 1} more: download the model anew")
    return tuple(places)


def _rope_factors(tensor: Tensor) -> np.ndarray:
    if math.prod(tensor.shape) > _MOST_FACTORS:
        raise UserError(f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, which no head needs")
    stored_dtype(tensor)
    with open_regular(tensor.path) as file:
        return read_tensor(file.fileno(), Place(tensor.name, tensor)).float().flatten().numpy()
