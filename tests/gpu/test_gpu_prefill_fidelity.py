"""The next token after a prompt that prefill reads: no farther from the fp32 model's than that of transformers in bf16."""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench.compare.fidelity import distances
from bench.rig import Rig
from megakernel.prefill.plan import CHUNK
from megakernel.text import codec_of
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.packed import PackedModel, numbers, pack
from models.reference import Reference
from models.smollm2 import fetched
from models.weights import Weights
from tests.gpu.test_gpu_fidelity import CONFIG, sharp_weights
from tests.support.hf_model import hf_model

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 513, 1000)
EDGES = (CHUNK - 1, CHUNK, CHUNK + 1)  # of a chunk
PROMPTS = 6
TEXTS: tuple[ModuleType, ...] = (argparse, heapq, random, statistics)  # of which every Python has the source


def mean_divergences(
    config: ModelConfig,
    model: PackedModel,
    tensors: Mapping[str, torch.Tensor],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> tuple[float, float]:
    """Mean KL divergence from the fp32 model, nats, after the first so many tokens of each prompt: ours, and transformers'."""
    with torch.device("cuda"):
        reference = Reference(config, {name: tensor.cuda() for name, tensor in tensors.items()}, torch.float32)
        truth = [reference.logits(prompt)[[length - 1 for length in lengths]].cpu().numpy() for prompt in prompts]
    del reference
    rig = Rig(model)
    ours = [torch.stack([rig.first_logits(prompt[:length]) for length in lengths]) for prompt in prompts]
    peer = hf_model(config, tensors, torch.bfloat16, "cuda")
    theirs = [torch.stack([last_row(peer, prompt[:length]) for length in lengths]) for prompt in prompts]
    return divergence(ours, truth), divergence(theirs, truth)


def last_row(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """The logits of transformers' model after a prompt, fp32 [vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(prompt)], device="cuda"), logits_to_keep=1).logits[0, -1]
    return logits.float().cpu()


def divergence(found: Sequence[torch.Tensor], truth: Sequence[np.ndarray]) -> float:
    """The mean over prompts and lengths, of logits [lengths, vocabulary] of each prompt."""
    each = [distances(rows.numpy(), judge, judge.argmax(1).tolist()) for rows, judge in zip(found, truth, strict=True)]
    return fmean(kl for distance in each for kl in distance.kl)


def test_random_weights_of_true_shape() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = sharp_weights()
    prompts = torch.randint(CONFIG.vocab_size, (PROMPTS, max(EDGES)), generator=generator).tolist()
    model = pack(Weights(tensors), CONFIG, torch.bfloat16, max(EDGES) + 1)
    ours, theirs = mean_divergences(CONFIG, model, tensors, prompts, (*LENGTHS, *EDGES))
    print(f"KL {ours:.2e}, transformers in bf16 {theirs:.2e} nats")
    assert ours <= theirs


@pytest.mark.smollm2
def test_a_trained_model() -> None:
    """SmolLM2-135M-Instruct on texts that come with Python."""
    checkpoint = open_checkpoint(str(fetched()))
    codec = codec_of(checkpoint)
    model = pack(checkpoint.source, checkpoint.config, torch.bfloat16, max(LENGTHS) + 1)
    config, tensors = numbers(model)
    prompts = [codec.encode(Path(str(text.__file__)).read_text())[: max(LENGTHS)] for text in TEXTS]
    assert all(len(prompt) == max(LENGTHS) for prompt in prompts)
    ours, theirs = mean_divergences(config, model, tensors, prompts, LENGTHS)
    print(f"KL {ours:.2e}, transformers in bf16 {theirs:.2e} nats")
    assert ours <= theirs
