"""Small models on the plain PyTorch backend, and an engine of one model on either backend that needs no GPU."""

from __future__ import annotations

import functools

import torch

from megakernel.engine import Engine
from megakernel.loading import load_engine
from megakernel.parts import BLOCK
from megakernel.torch.backend import TorchBackend
from megakernel.torch.model import TorchModel
from megakernel.torch.weights import Weights as TorchWeights
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.weights import Weights
from tests.support.configs import random_tensors, small_config

CPU = torch.device("cpu")


@functools.cache
def rounded(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors of a small model, with values that `dtype` holds, in fp32."""
    return {key: value.to(dtype).float() for key, value in random_tensors(small_config(name), seed=5).items()}


def torch_model(name: str, dtype: torch.dtype, device: torch.device = CPU) -> TorchModel:
    """A small model with the weights of `rounded`, for all of its context."""
    config = small_config(name)
    return TorchModel(config, TorchWeights(config, dtype, device, Weights(rounded(name, dtype))), config.max_position)


def torch_backend(name: str, dtype: torch.dtype = torch.float32) -> TorchBackend:
    return TorchBackend(torch_model(name, dtype))


def small_engine(name: str, backend: str, capacity: int) -> Engine:
    """One small model in fp32 on the backend named."""
    config: ModelConfig = small_config(name)
    checkpoint = Checkpoint(config, Weights(rounded(name, torch.float32)), None, torch.float32)
    return load_engine(name, backend, dtype="float32", capacity=capacity, checkpoint=checkpoint)


@torch.inference_mode()
def logits_in_passes(model: TorchModel, tokens: list[int], size: int) -> torch.Tensor:
    """Logits after every token, reading `size` at a time: fp32 [tokens, vocab], on the host."""
    pieces = torch.tensor(tokens, device=model.device).split(size)
    part = model.cache.part(range(-(-model.capacity // BLOCK)))
    return torch.cat([model.logits(model.extend(piece, index * size, part)) for index, piece in enumerate(pieces)]).cpu()
