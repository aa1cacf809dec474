"""Sampling in the kernel is that of `instructions.sampling`, for the same logits, seed and position, token for token."""

from __future__ import annotations

import pytest
import torch

from bench.rig import Rig
from instructions.base import GREEDY, SamplingState
from instructions.sampling import draw
from tests.support.gpu_models import random_tokens

pytestmark = pytest.mark.gpu
PROMPT, TOKENS = 4, 60
SAMPLINGS = [
    SamplingState(0.7, 0, 1.0, 1),
    SamplingState(1.0, 20, 1.0, 2),
    SamplingState(1.0, 0, 0.9, 3),
    SamplingState(1.3, 50, 0.8, 2**40 + 5),  # a seed of more than 32 bits
    SamplingState(3.0, 2047, 0.999, 2**63 - 1),  # one row is cut off, then hardly any
    SamplingState(2.0, 0, 0.05, 5),
]


def sampled(rig: Rig, sampling: SamplingState, tokens: int = TOKENS) -> tuple[list[int], list[torch.Tensor]]:
    """Tokens drawn one launch at a time, and the logits that each was drawn from."""
    rig.start(random_tokens("bundled", PROMPT), sampling)
    rig.decode(0, PROMPT - 1)
    chosen: list[int] = []
    logits = []
    for position in range(PROMPT - 1, PROMPT - 1 + tokens):
        chosen += rig.decode(position, 1)
        logits.append(rig.program(position).logits())
    return chosen, logits


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_those_of_the_specification(bundled_rig: Rig, sampling: SamplingState) -> None:
    chosen, logits = sampled(bundled_rig, sampling)
    expected = [draw(row, sampling, PROMPT - 1 + i) for i, row in enumerate(logits)]
    assert chosen == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_one_launch_draws_the_same(bundled_rig: Rig, sampling: SamplingState) -> None:
    chosen, _ = sampled(bundled_rig, sampling)
    bundled_rig.start(random_tokens("bundled", PROMPT), sampling)
    assert bundled_rig.decode(0, PROMPT - 1 + TOKENS)[PROMPT - 1 :] == chosen


def test_another_seed_draws_others(bundled_rig: Rig) -> None:
    hot = [sampled(bundled_rig, SamplingState(1.5, 0, 1.0, seed))[0] for seed in (1, 2, 1)]
    assert hot[0] == hot[2] != hot[1]


def test_top_k_of_one_is_greedy(bundled_rig: Rig) -> None:
    greedy, _ = sampled(bundled_rig, GREEDY)
    assert sampled(bundled_rig, SamplingState(1.0, 1, 1.0, 9))[0] == greedy
    assert sampled(bundled_rig, SamplingState(1.0, 0, 1e-6, 9))[0] == greedy, "the fewest rows that reach a tiny top_p"
