"""Which tensors a model has, under the names Hugging Face gives them, and how they are handed over one at a time.

Knows neither files (`models.checkpoint`) nor the tape (`models.packing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from models.config import ModelConfig
from models.errors import UserError
from models.families import base, layer_of

EMBEDDING = f"{base.EMBEDDING}.weight"
HEAD = f"{base.HEAD}.weight"


class WeightSource(Protocol):
    """Hands over every expected tensor exactly once, in any order, so that a reader need never hold them all.

    A matrix that is stored in a format of `models.formats` may come as `models.quantised.Quantised`, which stands for a tensor.
    A tensor is valid until the next one is asked for: it may be a view of a file that is then closed.
    """

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Pairs of name and host tensor, bf16, fp16 or fp32, of the shapes of `expected_tensors`."""
        ...


@dataclass(frozen=True)
class Weights:
    """All tensors of a model in host memory, by name: a `WeightSource` that can also be indexed."""

    by_name: Mapping[str, torch.Tensor]

    @classmethod
    def collect(cls, source: WeightSource, dtype: torch.dtype | None = None) -> Weights:
        """Copy every tensor of a source, converted to `dtype` when given."""
        return cls({name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in source.tensors()})

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`."""
        yield from self.by_name.items()


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, in the order of the network; no head when it is tied."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    of_layer = _layer_tensors(config)
    for layer in range(config.num_layers):
        shapes.update({base.layer_module(layer, name): shape for name, shape in of_layer.items()})
    shapes[f"{base.FINAL_NORM}.weight"] = (config.hidden_size,)
    if not config.tied_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def checked_tensors(source: WeightSource, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a source, none of them missing, left over or misshapen: else raises `UserError`."""
    pending = expected_tensors(config)
    for name, tensor in source.tensors():
        shape = pending.pop(name, None)
        if shape is None:
            raise UserError(f"tensor {name} is left over: this model has no such tensor, or it came twice")
        if tuple(tensor.shape) != shape:
            raise UserError(f"tensor {name} has shape {list(tensor.shape)}: this model needs {list(shape)}")
        yield name, tensor
    if pending:
        raise UserError(f"tensor {next(iter(pending))} is missing: this model needs {len(pending)} more tensors")


def parameter_count(config: ModelConfig) -> int:
    """Numbers in the checkpoint; a tied embedding counts once."""
    of_layer = sum(math.prod(shape) for shape in _layer_tensors(config).values())
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    return config.num_layers * of_layer + embeddings + config.hidden_size


def expert_size(config: ModelConfig) -> int:
    """Numbers in one expert of a layer; 0 where there are none."""
    linears = [linear for linear in layer_of(config).linears if linear.experts]
    return sum(sum(linear.rows(config).values()) * getattr(config, linear.columns) for linear in linears)


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within its layer and shape of every tensor of a layer."""
    layer = layer_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in layer.linears:
        for expert in linear.copies(config):
            for module, rows in linear.rows(config, expert).items():
                shapes[f"{module}.weight"] = (rows, getattr(config, linear.columns))
                if linear.has_bias(config):
                    shapes[f"{module}.bias"] = (rows,)
        normed = zip(linear.head_norms, linear.normed_rows(config), strict=True)
        shapes.update({f"{module}.weight": (rows,) for module, rows in normed})
    shapes.update({f"{norm.module}.weight": (config.hidden_size,) for norm in layer.norms})
    return shapes
