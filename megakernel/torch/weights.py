"""A model's weights as the plain PyTorch backend reads them: straight from a checkpoint, on one device.

What a layer holds is what its family says (`models.families`).  Modules that multiply the same input are stacked into one
matrix, rows in their own order; a matrix has a bias where any of its modules has one.  Knows nothing of what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megakernel.torch.threads import threads
from models.config import ModelConfig
from models.families import layer_of
from models.families.base import FINAL_NORM, HEAD, layer_module
from models.packing import check_finite
from models.weights import EMBEDDING, WeightSource, checked_tensors, expected_tensors

CHUNK_ELEMENTS = 2**22  # converted and checked at a time


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix [rows, K] in the weights' type, and its bias [rows] in fp32 where it has one."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mlp:
    """A layer's MLP, or one of its experts."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class Mixture:
    """A layer's experts, and the router that chooses among them."""

    router: Linear
    experts: tuple[Mlp, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: matrices, and norm weights in fp32 [hidden_size].  `head_norms`: those of a query and of a key head
    [head_dim], or of all queries and of all keys, in models that have them."""

    attention_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    mlp: Mlp | Mixture
    head_norms: tuple[Tensor, ...] = ()

    @classmethod
    def numbered(cls, tensors: NamedTensors, number: int) -> Layer:
        """One layer of the model, to be filled."""

        def vector(module: str) -> Tensor:
            return tensors.vector(f"{layer_module(number, module)}.weight")

        held, config = layer_of(tensors.config), tensors.config

        def matrix(kind: str, expert: int = 0) -> Linear:
            return tensors.linear(*(layer_module(number, name) for name in held.linear(kind).rows(config, expert)))

        if held.experts:
            experts = (Mlp(matrix("expert_gate_up", e), matrix("expert_down", e)) for e in range(config.num_experts))
            mlp: Mlp | Mixture = Mixture(matrix("router"), tuple(experts))
        else:
            mlp = Mlp(matrix("gate_up"), matrix("down"))
        norms: dict[str, Any] = {f"{norm.kind}_norm": vector(norm.module) for norm in held.norms}
        head_norms = tuple(vector(norm) for norm in held.linear("qkv").head_norms)
        return cls(qkv=matrix("qkv"), o=matrix("o"), mlp=mlp, head_norms=head_norms, **norms)


class NamedTensors:
    """Room on a device for the tensors of a model, by the names that a checkpoint gives them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.shapes = expected_tensors(config)
        self.places: dict[str, Tensor] = {}

    def vector(self, name: str) -> Tensor:
        """Room for one vector, in fp32."""
        return self.stacked([name], torch.float32)

    def linear(self, *modules: str) -> Linear:
        """Room for some modules as one matrix; zeros are the bias of one that has none beside one that has."""
        weight = self.stacked([f"{module}.weight" for module in modules], self.dtype)
        biases = [f"{module}.bias" for module in modules]
        if not any(name in self.shapes for name in biases):
            return Linear(weight)
        bias = torch.zeros(len(weight), device=self.device)
        rows = [self.shapes[f"{module}.weight"][0] for module in modules]
        parts = zip(biases, bias.split(rows), strict=True)
        self.places.update((name, part) for name, part in parts if name in self.shapes)
        return Linear(weight, bias)

    def stacked(self, names: list[str], dtype: torch.dtype) -> Tensor:
        """Room for some tensors, one above the other."""
        rows = [self.shapes[name][0] for name in names]
        room = torch.empty(sum(rows), *self.shapes[names[0]][1:], dtype=dtype, device=self.device)
        self.places.update(zip(names, room.split(rows), strict=True))
        return room

    def fill(self, source: WeightSource) -> None:
        """Copy every tensor to its place, rounded to the type kept there, holding one of the source's at a time.

        Raises UserError for a tensor missing, left over or misshapen, and for a value that is not finite as kept.
        """
        with threads(1):  # bound by memory, and by checks that one thread makes
            for name, tensor in checked_tensors(source, self.config):
                place = self.places[name]
                step = max(1, CHUNK_ELEMENTS // (tensor.numel() // len(tensor)))
                for start in range(0, len(tensor), step):
                    rows = tensor[start : start + step].to(place.dtype)
                    check_finite(name, tensor, rows, start)
                    place[start : start + step] = rows


class Weights:
    """All weights of a model.  `head` is the embedding where they are tied."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, source: WeightSource) -> None:
        """Raises UserError as `NamedTensors.fill`."""
        tensors = NamedTensors(config, dtype, device)
        self.embedding = tensors.stacked([EMBEDDING], dtype)
        self.layers = [Layer.numbered(tensors, layer) for layer in range(config.num_layers)]
        self.final_norm = tensors.vector(f"{FINAL_NORM}.weight")
        self.head = Linear(self.embedding) if config.tied_embeddings else tensors.linear(HEAD)
        tensors.fill(source)
