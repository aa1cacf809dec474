"""Llama-3.2-1B's true shape: next-token distributions no farther from the fp32 model than those of transformers in bf16."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch

from bench.compare.fidelity import Distances, distances
from bench.compare.reference import continued, drawing
from bench.rig import Rig
from models.families import PRESETS
from models.packed import pack
from models.random_weights import RandomWeights
from models.reference import Reference
from models.weights import Weights
from tests.support.hf_model import hf_model

pytestmark = pytest.mark.gpu
CONFIG = PRESETS["llama-3.2-1b"]
CAPACITY = 128
PROMPTS, PROMPT, POSITIONS = 8, 24, 32
SHARPNESS = 4.0  # on the last norm: logits of made-up weights then spread as far as a trained model's, not nearly flat


def sharp_weights() -> dict[str, torch.Tensor]:
    tensors = dict(Weights.collect(RandomWeights(CONFIG)).by_name)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * SHARPNESS
    return tensors


def judged(tensors: dict[str, torch.Tensor]) -> list[tuple[list[int], Any]]:
    """Sequences that the fp32 model draws after random prompts, with its logits for every token drawn."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(CONFIG.vocab_size, (PROMPTS, PROMPT), generator=generator).tolist()
    with torch.device("cuda"):
        reference = Reference(CONFIG, {name: tensor.cuda() for name, tensor in tensors.items()}, torch.float32)
        found = [continued(reference, prompt, POSITIONS, drawing(seed)) for seed, prompt in enumerate(prompts)]
    return [([*prompt, *drawn], rows) for prompt, (drawn, rows) in zip(prompts, found, strict=True)]


def summed_up(found: list[Distances]) -> tuple[float, float]:
    """Mean KL divergence and mean distance of the NLL from the reference's, nats."""
    kl = [value for each in found for value in each.kl]
    nll = [abs(a - b) for each in found for a, b in zip(each.nll, each.reference_nll, strict=True)]
    assert len(kl) == len(nll) == PROMPTS * POSITIONS
    return fmean(kl), fmean(nll)


def test_no_worse_than_transformers_in_bf16() -> None:
    tensors = sharp_weights()
    sequences = judged(tensors)
    rig = Rig(pack(Weights(tensors), CONFIG, torch.bfloat16, CAPACITY))
    ours = [
        distances(rig.logits_of(tokens[:-1], first=PROMPT - 1).numpy(), rows, tokens[PROMPT:]) for tokens, rows in sequences
    ]
    model = hf_model(CONFIG, tensors, torch.bfloat16, "cuda")
    theirs = []
    for tokens, rows in sequences:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:-1]], device="cuda")).logits[0, PROMPT - 1 :]
        theirs.append(distances(logits.float().cpu().numpy(), rows, tokens[PROMPT:]))
    (kl, nll), (their_kl, their_nll) = summed_up(ours), summed_up(theirs)
    print(f"KL {kl:.2e} (transformers in bf16 {their_kl:.2e}), NLL error {nll:.2e} ({their_nll:.2e}) nats")
    assert kl <= their_kl
    assert nll <= their_nll
    flat = torch.tensor(float(CONFIG.vocab_size)).log()
    assert fmean(value for each in theirs for value in each.reference_nll) < 0.7 * flat, "the distributions are not flat"
