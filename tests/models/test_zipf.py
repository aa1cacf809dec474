"""Skewed routers: choices follow Zipf's law, in the arithmetic, in the reference and on the CPU machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megakernel.vm import Vm
from models.config import ModelConfig
from models.errors import UserError
from models.families import PRESETS
from models.packed import pack
from models.random_weights import RandomWeights
from models.reference import Reference
from models.weights import Weights
from models.zipf import MOST_CHANCE, largest_exponent, zipf_chances, zipf_scales
from scheduler.build import build_program, make_shape

MIXTURES = [(name, config) for name, config in PRESETS.items() if config.num_experts]
SMALL = replace(
    PRESETS["olmoe-1b-7b"],
    num_layers=1, hidden_size=128, intermediate_size=64, num_heads=2, num_kv_heads=2, head_dim=64,
    vocab_size=2048, num_experts=16, experts_per_token=3, max_position=256,
)  # fmt: skip
EXPONENT = 0.45
CONTEXT, CONTEXTS = 32, 20


def fitted(counts: Sequence[float]) -> float:
    """The exponent of the power of the rank that these counts follow, by least squares over the logarithms."""
    ranks = np.arange(1, len(counts) + 1)
    return float(-np.polyfit(np.log(ranks), np.log(np.maximum(counts, 1)), 1)[0])


@pytest.mark.parametrize("config", [config for _, config in MIXTURES], ids=[name for name, _ in MIXTURES])
def test_normal_scores_so_scaled_choose_by_zipf_s_law(config: ModelConfig) -> None:
    """For every published mixture, up to the largest exponent: the share of tokens within a tenth and five standard errors."""
    experts, chosen, tokens = config.num_experts, config.experts_per_token, 20_000
    largest = largest_exponent(experts, chosen)
    assert largest is not None and largest > 0.2
    for exponent in (0.0, largest / 2, largest):
        scales = np.array(zipf_scales(experts, chosen, exponent))
        assert np.mean(scales**2) == pytest.approx(1)
        scores = np.random.default_rng(0).standard_normal((tokens, experts)) * scales
        best = np.argpartition(-scores, chosen, axis=1)[:, :chosen]
        counts = np.bincount(best.ravel(), minlength=experts)
        expected = tokens * np.array(zipf_chances(experts, chosen, exponent))
        assert expected.sum() == pytest.approx(tokens * chosen)
        assert np.all(np.abs(counts - expected) < 0.1 * expected + 5 * np.sqrt(expected)), exponent
        assert fitted(counts.tolist()) == pytest.approx(exponent, abs=0.05)


@pytest.mark.parametrize("exponent", [-0.1, 0.6, float("nan")])
def test_what_no_router_can_do_is_refused_with_the_limit(exponent: float) -> None:
    assert largest_exponent(128, 8) == 0.55
    assert zipf_chances(128, 8, 0.55)[0] <= MOST_CHANCE < zipf_chances(128, 8, 0.56)[0]
    with pytest.raises(UserError, match="8 of 128 experts by Zipf's law of exponent .*: use 0 to 0.55"):
        zipf_scales(128, 8, exponent)
    with pytest.raises(UserError, match="4 of 8 experts .*: none can"):
        zipf_scales(8, 4, 0.1)


class Watching(Reference):
    """The reference; counts which experts its router chooses."""

    def mixture_counts(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """How often each expert is chosen for the tokens of these prompts."""
        counts: Counter[int] = Counter()
        products = self._products

        def watched(layer: int, kind: str, x: torch.Tensor, expert: int = 0) -> list[torch.Tensor]:
            found = products(layer, kind, x, expert)
            if kind == "router":
                counts.update(found[0].topk(self.config.experts_per_token, dim=-1).indices.flatten().tolist())
            return found

        self._products = watched  # type: ignore[method-assign]
        for prompt in prompts:
            self.logits(prompt)
        return np.array([counts[expert] for expert in range(self.config.num_experts)])


@pytest.mark.parametrize("zipf", [0.0, EXPONENT])
def test_the_reference_chooses_by_zipf_s_law(zipf: float) -> None:
    """640 tokens, 3 of 16 experts each; an exponent of 0 is an even choice.  Of one small router an expert may have half as
    many again as the law says, or as many less, but the exponent is right."""
    reference = Watching(SMALL, Weights.collect(RandomWeights(SMALL, dtype=torch.float32, zipf=zipf)).by_name)
    prompts = np.random.default_rng(0).permutation(SMALL.vocab_size)[: CONTEXT * CONTEXTS].reshape(CONTEXTS, CONTEXT)
    counts = reference.mixture_counts(prompts.tolist())
    assert counts.sum() == 3 * CONTEXT * CONTEXTS
    assert fitted(counts.tolist()) == pytest.approx(zipf, abs=0.15)
    expected = np.array(zipf_chances(16, 3, zipf)) * CONTEXT * CONTEXTS
    assert 1 / 1.6 < np.min(counts / expected) < np.max(counts / expected) < 1.6


def test_the_cpu_machine_chooses_the_first_experts_more_often() -> None:
    """Of 20 tokens' choices the first quarter of the experts has more than half as many again as its even share of 15."""
    first: dict[float, int] = {}
    for zipf in (0.0, EXPONENT):
        made = build_program(make_shape(SMALL, sms=3, capacity=64, bucket=64), 3)
        vm = Vm(made, pack(RandomWeights(SMALL, zipf=zipf), SMALL, torch.bfloat16, 64))
        vm.state.start([(97 * place) % SMALL.vocab_size for place in range(20)])
        base, first[zipf] = made.shape.buffers["choice"].base, 0
        for _ in range(20):
            vm.launch(1)
            chosen = vm.memory.values[base : base + 3].int().tolist()
            assert len(set(chosen)) == 3
            first[zipf] += sum(expert < 4 for expert in chosen)
    assert first[0.0] < 22 < first[EXPONENT], first
