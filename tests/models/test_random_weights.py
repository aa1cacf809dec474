"""Made-up weights: the right names, shapes, scale and variety, and the same bits every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.checkpoint import open_checkpoint
from models.errors import UserError
from models.families import PRESETS
from models.random_weights import BLOCK_VALUES, RandomWeights
from models.reference import Reference
from models.weights import EMBEDDING, Weights, expected_tensors
from models.zipf import zipf_scales
from tests.support.configs import small_config

SMALL = small_config("all_biases_linear_head24")
WIDE = replace(SMALL, hidden_size=512, vocab_size=2048)  # an embedding of four blocks


def test_names_and_shapes() -> None:
    tensors = dict(RandomWeights(SMALL).tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_tensors(SMALL)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_seed_decides_every_bit() -> None:
    first, again = dict(RandomWeights(SMALL, 3).tensors()), dict(RandomWeights(SMALL, 3).tensors())
    other = dict(RandomWeights(SMALL, 4).tensors())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_bits_do_not_change_between_versions() -> None:
    """A recorded figure names its seed, so the values behind it must stay."""
    first = next(iter(RandomWeights(SMALL, 0, torch.float32).tensors()))[1].flatten()[:3]
    assert first.tolist() == pytest.approx([0.028751664, -0.005569212, 0.013265734], rel=1e-6)


def test_scale() -> None:
    tensors = dict(RandomWeights(WIDE, dtype=torch.float32).tensors())
    embedding = tensors[EMBEDDING]
    # a standard error of a standard deviation over n values is 1 / sqrt(2 n): 0.14 % for one block; five of them
    assert embedding.std().item() == pytest.approx(0.02, rel=5 / (2 * BLOCK_VALUES) ** 0.5)
    assert abs(embedding.mean().item()) < 5 * 0.02 / BLOCK_VALUES**0.5
    norm = tensors["model.norm.weight"]
    assert norm.mean().item() == pytest.approx(1, abs=5 * 0.1 / 512**0.5)
    assert norm.std().item() == pytest.approx(0.1, rel=5 / 1024**0.5)


def test_no_two_rows_are_alike() -> None:
    """Blocks repeat, rows must not: neither within a tensor nor between tensors."""
    tensors = RandomWeights(WIDE).tensors()
    rows = torch.cat([tensor.view(torch.int16) for _, tensor in tensors if tensor.shape[1:] == (512,)])
    assert len(rows) > 2048
    assert len(torch.unique(rows, dim=0)) == len(rows)


class Watched(Reference):
    """Counts the experts that tokens choose, layer by layer."""

    chosen: list[torch.Tensor]

    def _mixture(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        [scores] = self._products(layer, "router", x)
        chosen = scores.topk(self.config.experts_per_token).indices
        self.chosen.append(torch.bincount(chosen.flatten(), minlength=self.config.num_experts))
        return super()._mixture(layer, x)


def test_tokens_choose_experts_evenly_in_every_layer() -> None:
    """128 tokens, 8 of 64 experts: 16 rows an expert on average."""
    narrow = replace(PRESETS["olmoe-1b-7b"], hidden_size=256, intermediate_size=64, vocab_size=512)
    config = replace(narrow, num_heads=4, num_kv_heads=4, head_dim=64)
    reference = Watched(config, {name: tensor.float() for name, tensor in RandomWeights(config).tensors()})
    reference.chosen = []
    reference.logits(torch.randint(512, (128,), generator=torch.Generator().manual_seed(0)).tolist())
    assert len(reference.chosen) == config.num_layers
    assert all((counts > 0).sum() >= 62 and counts.max() < 48 for counts in reference.chosen)


def test_presets_by_name() -> None:
    checkpoint = open_checkpoint("random:llama-3.2-1b")
    assert checkpoint.config == PRESETS["llama-3.2-1b"]
    assert checkpoint.directory is None and checkpoint.stored_dtype == torch.bfloat16
    assert checkpoint.source == RandomWeights(checkpoint.config)


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match="random:llama-9: no such preset, choose one of random:llama-3.2-1b, "):
        open_checkpoint("random:llama-9")


def test_a_router_by_zipf_s_law_has_longer_rows_for_the_first_experts() -> None:
    config = replace(PRESETS["olmoe-1b-7b"], num_layers=1, hidden_size=256, vocab_size=64, num_experts=16, experts_per_token=2)
    even, skewed = (Weights.collect(RandomWeights(config, zipf=zipf)).by_name for zipf in (0.0, 0.6))
    router = "model.layers.0.mlp.gate.weight"
    assert all(torch.equal(even[name], skewed[name]) for name in even if name != router)
    ratio = skewed[router].float().norm(dim=1) / even[router].float().norm(dim=1)
    assert torch.allclose(ratio, torch.tensor(zipf_scales(16, 2, 0.6)), rtol=1e-2)
    with pytest.raises(
        UserError, match="a random router cannot choose 2 of 16 experts by Zipf's law of exponent 3: use 0 to 0.77"
    ):
        RandomWeights(config, zipf=3.0)


def test_experts_differ_though_they_are_drawn_together() -> None:
    config = replace(PRESETS["olmoe-1b-7b"], num_layers=1, hidden_size=256, intermediate_size=64, vocab_size=64, num_experts=8)
    tensors = Weights.collect(RandomWeights(config)).by_name
    rows = torch.cat([tensors[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"] for expert in range(8)])
    assert len(rows.unique(dim=0)) == len(rows)
