"""Prefill's chain of a model on the CPU, for whoever runs it launch by launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megakernel.geometry import make_geometry
from megakernel.options import Sizes
from megakernel.prefill.chain import Chain
from megakernel.prefill.plan import Plan
from models.config import ModelConfig
from models.formats import PLAIN, Formats
from models.packed import PackedModel, pack
from models.tape import PAGE_BYTES
from models.weights import Weights
from scheduler.build import build_program, make_shape

CAPACITY = 128  # of the cache


def packed(config: ModelConfig, tensors: dict[str, torch.Tensor], formats: Formats = PLAIN) -> PackedModel:
    """A model with a cache of `CAPACITY` positions."""
    return pack(Weights(tensors), config, torch.bfloat16, CAPACITY, formats)


def chain_of(model: PackedModel) -> Chain:
    """A model's chain, whose tensors lie on the CPU."""
    config, formats = model.config, model.tape.formats
    shape = make_shape(config, sms=7, capacity=CAPACITY, bucket=CAPACITY, formats=formats)
    sizes = Sizes(make_geometry(build_program(shape, 7)))
    tokens = torch.zeros(1, dtype=torch.int32)
    state: Any = SimpleNamespace(config=config, device=torch.device("cpu"), capacity=CAPACITY, tokens=tokens)
    state.weights, state.constants, state.rope = model.weights, model.constants, model.rope
    state.cache = torch.zeros(shape.cache_pages, PAGE_BYTES // 2, dtype=torch.bfloat16)
    return Chain(state, sizes, Plan(config, 7, CAPACITY, formats))
