"""A prompt that prefill reads: as faithful as one that is decoded token by token, whatever the heads, the sizes, the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from bench.rig import Rig, device_sms
from megakernel.prefill.plan import CHUNK, CLASSES
from megakernel.prefill.prefill import Prefill
from models.config import ModelConfig, RopeScaling
from models.packed import pack
from models.reference import Reference
from models.weights import Weights
from scheduler.buckets import BucketPrograms
from tests.support.configs import random_tensors

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 512, 513, 1000)
LONGEST = max(LENGTHS)
PIECES = ((1,), (999,), (64, 65), (127, 300, 301, 900), (512,), (777,))  # where the pieces of 1,000 tokens end, but the last
ROUNDINGS = 1.5  # the rms error that prefill may have, in decode's own: each rounds the same values, in another order


def config_of(
    hidden: int, intermediate: int, layers: int, heads: tuple[int, int, int], vocabulary: int, **more: Any
) -> ModelConfig:
    """Heads are query heads, K/V heads, elements."""
    query, key_value, dim = heads
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": intermediate}
    sizes |= {"num_layers": layers, "vocab_size": vocabulary}
    return ModelConfig(**sizes, num_heads=query, num_kv_heads=key_value, head_dim=dim, max_position=16384, **more)


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.05, "residual_multiplier": 0.22, "logits_scaling": 8.0}
CONFIGS = {
    "GQA of 4, heads of 64": config_of(512, 1024, 3, (8, 2, 64), 1003, rope_scaling=LLAMA3),
    "MHA, heads of 32, one layer": config_of(192, 320, 1, (6, 6, 32), 500),
    "GQA of 3, heads of 64, tied": config_of(576, 1536, 2, (9, 3, 64), 999, tied_embeddings=True),
    "MQA, heads of 80, biases": config_of(320, 600, 2, (4, 1, 80), 777, qkv_bias=True, o_bias=True, mlp_bias=True),
    "GQA of 2, heads of 96": config_of(384, 1000, 2, (4, 2, 96), 640, rope_scaling=RopeScaling("linear", 4.0)),
    "GQA of 7, heads of 128": config_of(896, 1280, 2, (7, 1, 128), 1024),
    "normed heads of 64": config_of(512, 1024, 2, (8, 2, 64), 1003, family="qwen3"),
    "normed heads of 128": config_of(512, 768, 2, (6, 2, 128), 700, family="qwen3"),
    "multipliers": config_of(512, 1024, 2, (8, 2, 64), 1003, family="granite", **MULTIPLIERS),
    "heads of 256": config_of(256, 512, 2, (2, 1, 256), 300),
    "sizes of no whole tiles": config_of(200, 300, 2, (5, 1, 36), 333),
}


@cache
def tensors_of(name: str) -> dict[str, torch.Tensor]:
    return {key: values.to(torch.bfloat16) for key, values in random_tensors(CONFIGS[name], seed=7).items()}


def rig_of(name: str, capacity: int) -> Rig:
    config = CONFIGS[name]
    programs = BucketPrograms(config, device_sms(), capacity, 2)
    return Rig(pack(Weights(tensors_of(name)), config, torch.bfloat16, programs.capacity), programs)


def reference_logits(name: str, tokens: list[int]) -> torch.Tensor:
    """fp32 [tokens, vocab], on the host."""
    with torch.device("cuda"):
        reference = Reference(CONFIGS[name], {key: values.cuda() for key, values in tensors_of(name).items()}, torch.float32)
        return reference.logits(tokens).cpu()


def random_tokens(name: str, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIGS[name].vocab_size, (count,), generator=generator).tolist()


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def worst_row(name: str, rows: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest distance of two rows of the KV cache, relative to the second's length."""
    dims = CONFIGS[name].padded_head_dim  # beyond them a head's lines are not used
    rows, wanted = (each.view(torch.bfloat16).float().transpose(1, 2).flatten(2)[..., :dims] for each in (rows, wanted))
    return float(((rows - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-3)).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_as_faithful_as_decode(name: str) -> None:
    rig, tokens = rig_of(name, LONGEST + 24), random_tokens(name, LONGEST)
    reference = reference_logits(name, tokens)
    places = torch.tensor([length - 1 for length in LENGTHS])
    decoded = rig.logits_of(tokens)
    rows = rig.cache_rows(LONGEST)
    rig.state.cache.fill_(3.0e38)  # what earlier requests left must not matter
    read = []
    for length in LENGTHS:
        read.append(rig.first_logits(tokens[:length]))
        assert torch.equal(rig.first_logits(tokens[:length]), read[-1]), "the same bits again"
    ours, decodes = torch.stack(read) - reference[places], (decoded - reference)[places]
    worst = worst_row(name, rig.cache_rows(LONGEST), rows)
    print(f"{name}: rms error {rms(ours):.2e}, decode's {rms(decodes):.2e}; worst row {worst:.1e}")
    assert torch.isfinite(ours).all()
    assert rms(ours) <= ROUNDINGS * rms(decodes)
    assert ours.abs().max() <= 2 * (decoded - reference).abs().max()
    # a row is rounded to 8 bits once, and computed from values that were, layer after layer
    assert worst <= 0.02 * CONFIGS[name].num_layers


def test_decode_goes_on_from_what_prefill_left() -> None:
    name = "GQA of 4, heads of 64"
    rig, tokens = rig_of(name, 600), random_tokens(name, 560, seed=1)
    reference = reference_logits(name, tokens)
    decoded = rig.logits_of(tokens, first=500)
    rig.read(tokens[:500])
    rows = []
    for position in range(500, 560):
        rig.start(tokens[: position + 1])
        rig.program(position).launch(position, 1).land()
        rows.append(rig.program(position).logits())
    ours, decodes = torch.stack(rows) - reference[500:], decoded - reference[500:]
    assert rms(ours) <= ROUNDINGS * rms(decodes)


def logits_in_pieces(rig: Rig, tokens: list[int], places: Sequence[int]) -> torch.Tensor:
    """The logits after a prompt that is read in pieces, which end at these places."""
    rig.state.cache.zero_()
    kept = 0
    for place in places:
        rig.read(tokens[:place], kept)
        kept = place
    return rig.first_logits(tokens, kept)


def test_a_prompt_in_pieces() -> None:
    """What is kept of a prompt, at any place, and what that does to the rest: rounding alone."""
    name = "GQA of 3, heads of 64, tied"
    rig, tokens = rig_of(name, 1024), random_tokens(name, 1000, seed=2)
    reference = reference_logits(name, tokens)[-1]
    whole = rig.first_logits(tokens)
    error = rms(whole - reference)
    for places in PIECES:
        assert rms(logits_in_pieces(rig, tokens, places) - reference) <= 2 * error


@pytest.mark.parametrize("edge", [*CLASSES[2:], 2 * CHUNK])
def test_both_sides_of_every_edge_of_chunks_and_classes(edge: int) -> None:
    name = "MQA, heads of 80, biases"
    rig, tokens = long_rig(), random_tokens(name, 2 * CHUNK + 1, seed=3)
    for length in (edge - 1, edge, edge + 1):
        reference = reference_logits(name, tokens[:length])[-1]
        assert rms(rig.first_logits(tokens[:length]) - reference) <= 0.03 * rms(reference)


@cache
def long_rig() -> Rig:
    return rig_of("MQA, heads of 80, biases", 2 * CHUNK + 64)


@pytest.mark.parametrize("sms", [1, 7, 100])
def test_fewer_sms(sms: int) -> None:
    name = "GQA of 7, heads of 128"
    rig, tokens = rig_of(name, 600), random_tokens(name, 513, seed=4)
    whole = rig.first_logits(tokens)
    rig.prefill = Prefill(rig.state, rig.program(0).sizes, sms)
    rig.state.cache.zero_()
    assert rms(rig.first_logits(tokens) - whole) <= 0.01 * rms(whole)


def test_what_is_no_number_stays_with_its_request() -> None:
    """A prompt of NaN leaves numbers in the cache, and the next prompt's bits are its own."""
    name = "GQA of 2, heads of 96"
    rig, tokens = rig_of(name, 300), random_tokens(name, 200, seed=5)
    wanted = rig.first_logits(tokens)
    norms = rig.state.constants.clone()
    rig.state.constants[:100] = float("nan")
    rig.start(tokens)
    rig.prefill.launch(0, len(tokens))
    torch.cuda.synchronize()
    assert torch.isfinite(rig.state.cache).all()
    rig.state.constants.copy_(norms)
    assert torch.equal(rig.first_logits(tokens[:150]), rig.first_logits(tokens[:150]))
    assert torch.equal(rig.first_logits(tokens), wanted)


def test_configs_cover_what_they_are_named_for() -> None:
    assert {config.head_dim for config in CONFIGS.values()} >= {32, 64, 80, 96, 128, 256}
    assert {config.group for config in CONFIGS.values()} >= {1, 2, 3, 4, 7}
    assert replace(CONFIGS["sizes of no whole tiles"]).padded_head_dim != CONFIGS["sizes of no whole tiles"].head_dim
