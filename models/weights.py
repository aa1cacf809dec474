"""Which tensors a model has, under the names Hugging Face gives them, and how they are handed over one at a time.

Knows neither files (`models.checkpoint`) nor the tape (`models.packing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from models.config import ModelConfig
from models.errors import UserError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class WeightSource(Protocol):
    """Hands over every expected tensor exactly once, in any order, so that a reader need never hold them all.

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
    for layer in range(config.num_layers):
        shapes.update(_layer_tensors(config, f"model.layers.{layer}"))
    shapes["model.norm.weight"] = (config.hidden_size,)
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


def _layer_tensors(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for module, shape in linear.items():
        shapes[f"{prefix}.{module}.weight"] = shape
        if config.attention_bias if module.startswith("self_attn") else config.mlp_bias:
            shapes[f"{prefix}.{module}.bias"] = shape[:1]
    shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes
