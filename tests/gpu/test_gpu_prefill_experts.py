"""Prompts of mixtures of experts that prefill reads: as faithful as plain bf16, whatever the family and the length.

Rounding may send a token to another expert where two scores are nearly equal, in prefill, in decode and in the plain model
alike.  So errors are asked of the typical position and of most.  Where a router's weights are zeros all tokens take the same
experts, and no one else has any rows: then errors are asked of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from bench.rig import Rig, device_sms
from megakernel.engine import Engine
from megakernel.prefill.plan import CHUNK, CLASSES, EXPERT_KINDS
from megakernel.prefill.prefill import Prefill
from megakernel.prefill.reference import permute, route
from models.config import ModelConfig
from models.formats import Formats
from models.packed import PackedModel, numbers, pack
from models.reference import Reference
from models.weights import Weights
from scheduler.buckets import BucketPrograms
from tests.gpu.test_gpu_formats import rounded
from tests.gpu.test_gpu_prefill import PIECES, logits_in_pieces
from tests.support.configs import MIXTURES, random_tensors, small_config
from tests.support.gpu_models import config_of, weights_of
from tests.support.preparation import EXPERT_PRESETS, Preparation

pytestmark = pytest.mark.gpu
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000)
LENGTHS = tuple(sorted({*EDGES, *range(301, 1000, 23)}))  # the typical error needs some more
MOST = 0.9  # of the positions
ROUNDINGS = 1.5  # of what bf16 does: other values are rounded, in another order
LONG = 2 * CHUNK + 64
QUANTISED = {"mixtral": Formats("fp8", "fp8"), "olmoe": Formats("int4", "int4")}


def small(name: str) -> ModelConfig:
    """Two layers, as the tests of decoding have them: so the kernel is one."""
    return small_config(name, 2 * LONG)


@cache
def tensors_of(name: str, tied: bool = False) -> dict[str, torch.Tensor]:
    """bf16; with ties, of routers whose scores are all equal."""
    found = {key: values.to(torch.bfloat16) for key, values in random_tensors(small(name), seed=7).items()}
    routers = [key for key, values in found.items() if values.shape == (small(name).num_experts, small(name).hidden_size)]
    assert len(routers) == small(name).num_layers
    return found | {key: torch.zeros_like(found[key]) for key in routers if tied}


@cache
def rig_of(name: str, capacity: int, tied: bool = False) -> Rig:
    config = small(name)
    programs = BucketPrograms(config, device_sms(), capacity, 2)
    return Rig(pack(Weights(tensors_of(name, tied)), config, torch.bfloat16, programs.capacity), programs)


def reference_of(
    config: ModelConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype, tokens: Sequence[int]
) -> torch.Tensor:
    """Logits fp32 [tokens, vocab] of the plain model, on the host."""
    with torch.device("cuda"):
        on_gpu = {key: values.cuda() for key, values in tensors.items()}
        return Reference(config, on_gpu, dtype).logits(tokens).cpu()


@cache
def references(name: str, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of fp32 and of bf16."""
    tokens, tensors = random_tokens(small(name), max(LENGTHS)), tensors_of(name, tied)
    true, plain = (reference_of(small(name), tensors, dtype, tokens) for dtype in (torch.float32, torch.bfloat16))
    return true, plain


def random_tokens(config: ModelConfig, count: int, seed: int = 0) -> list[int]:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def rms(values: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return values.double().square().mean(-1).sqrt()


def tell(name: str, ours: torch.Tensor, bound: torch.Tensor) -> None:
    """What was measured, beside what bf16 has."""
    most = f"{ours.quantile(MOST):.2e} of {bound.quantile(MOST):.2e}"
    print(f"{name}: median {ours.median():.2e} of {bound.median():.2e}, of most at most {most}")


def read_all(rig: Rig, tokens: list[int]) -> torch.Tensor:
    """Logits after each of the lengths, fp32 [lengths, vocab]; of those at edges twice, for the same bits."""
    rows = []
    for length in LENGTHS:
        rows.append(rig.first_logits(tokens[:length]))
        if length in EDGES:
            assert torch.equal(rig.first_logits(tokens[:length]), rows[-1]), "the same bits again"
    found = torch.stack(rows)
    assert torch.isfinite(found).all()
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_as_faithful_as_bf16(name: str) -> None:
    rig, tokens = rig_of(name, LONG), random_tokens(small(name), max(LENGTHS))
    places = torch.tensor([length - 1 for length in LENGTHS])
    true, plain = references(name, tied=False)
    rig.state.cache.fill_(3.0e38)  # what earlier requests left must not matter
    ours, bound = rms(read_all(rig, tokens) - true[places]), rms(plain - true)
    tell(name, ours, bound)
    assert ours.median() <= bound.median()
    assert ours.quantile(MOST) <= ROUNDINGS * bound.quantile(MOST)


@pytest.mark.parametrize("name", MIXTURES)
def test_all_tokens_with_the_same_experts(name: str) -> None:
    """No position is excused, and neither is a row of the cache; most experts have no rows."""
    rig, tokens = rig_of(name, 1040, tied=True), random_tokens(small(name), max(LENGTHS))
    places = torch.tensor([length - 1 for length in LENGTHS])
    true, plain = references(name, tied=True)
    ours, bound = read_all(rig, tokens) - true[places], plain - true
    rows = rig.cache_rows(max(LENGTHS))
    ends = rig.prefill.chain.tensors["ends"].cpu()
    used, count = small(name).experts_per_token, max(LENGTHS)
    assert ends.tolist() == [min(expert + 1, used) * count for expert in range(small(name).num_experts)]
    print(f"{name}: rms error {rms(ours.flatten()):.2e}, bf16's {rms(bound.flatten()):.2e}")
    assert rms(ours.flatten()) <= rms(bound.flatten())
    assert ours.abs().max() <= 2 * bound.abs().max()
    rig.state.cache.zero_()
    rig.start(tokens)
    rig.decode(0, len(tokens))
    assert worst_rows(small(name), rows, rig.cache_rows(max(LENGTHS))).max() <= 0.02 * small(name).num_layers


def worst_rows(config: ModelConfig, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Distances of the KV cache's rows, relative to the second's length, [heads, positions]."""
    dims = config.padded_head_dim  # beyond them a head's lines are not used
    rows, wanted = (each.view(torch.bfloat16).float().transpose(1, 2).flatten(2)[..., :dims] for each in (rows, wanted))
    return (rows - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-3)


@pytest.mark.parametrize("name", MIXTURES)
def test_rows_of_the_cache_are_decode_s(name: str) -> None:
    """All of the first layer, which no expert has touched; of the second those of most tokens."""
    rig, tokens, count = rig_of(name, LONG), random_tokens(small(name), 1000, seed=2), 1000
    rig.read(tokens)
    rows = rig.cache_rows(count)
    rig.state.cache.zero_()
    rig.start(tokens)
    rig.decode(0, count)
    distances = worst_rows(small(name), rows, rig.cache_rows(count)).view(small(name).num_layers, -1, count)
    assert distances[0].max() <= 0.02
    assert (distances[1].amax(0) <= 0.04).float().mean() >= MOST


@pytest.mark.parametrize("name", MIXTURES)
def test_routing_of_a_whole_chunk(name: str) -> None:
    """Scores that the router left, routed by the reference: the same places, shares and ends; rows of fewer tokens stay."""
    rig, config = rig_of(name, LONG), small(name)
    for count in (1, 31, 33, 64, 1000, CHUNK - 1, CHUNK):
        rig.read(random_tokens(config, count, seed=count))
        found = {what: values.cpu() for what, values in rig.prefill.chain.tensors.items()}
        scores = found["scores"][:count, : config.num_experts]
        experts, shares = route(scores, config.experts_per_token, config.renormalised)
        places, ends = permute(experts, config.num_experts)
        assert torch.equal(found["places"][:count].long(), places)
        assert torch.equal(found["ends"].long(), ends)
        torch.testing.assert_close(found["shares"][:count], shares)
        torch.testing.assert_close(found["row_shares"][places], shares)


@pytest.mark.parametrize("name", MIXTURES)
def test_decode_goes_on_from_what_prefill_left(name: str) -> None:
    rig, config = rig_of(name, LONG), small(name)
    tokens, first = random_tokens(config, 348, seed=1), 300
    true = reference_of(config, tensors_of(name), torch.float32, tokens)[first:]
    plain = reference_of(config, tensors_of(name), torch.bfloat16, tokens)[first:]
    rig.read(tokens[:first])
    rows = []
    for position in range(first, len(tokens)):
        rig.start(tokens[: position + 1])
        rig.program(position).launch(position, 1).land()
        rows.append(rig.program(position).logits())
    assert rms(torch.stack(rows) - true).median() <= rms(plain - true).median()


def test_a_prompt_in_pieces() -> None:
    """What is kept of a prompt, at any place, and what that does to the rest: rounding alone."""
    name = "mixtral"
    rig, tokens = rig_of(name, 1040, tied=True), random_tokens(small(name), 1000)
    true = references(name, tied=True)[0][-1]
    error = rms(rig.first_logits(tokens) - true)
    for places in PIECES:
        assert rms(logits_in_pieces(rig, tokens, places) - true) <= 2 * error


@pytest.mark.parametrize("edge", [*CLASSES[2:], 2 * CHUNK])
def test_both_sides_of_every_edge_of_chunks_and_classes(edge: int) -> None:
    """Of five lengths the typical one; one of them may have a token with two scores nearly equal."""
    name = "granitemoe"
    rig, tokens = rig_of(name, LONG), random_tokens(small(name), 2 * CHUNK + 2, seed=3)
    errors, bounds = [], []
    for length in range(edge - 2, edge + 3):
        true, plain = (
            reference_of(small(name), tensors_of(name), dtype, tokens[:length])[-1] for dtype in (torch.float32, torch.bfloat16)
        )
        errors.append(rms(rig.first_logits(tokens[:length]) - true))
        bounds.append(rms(plain - true))
    print(f"{edge}: {torch.stack(errors).median():.2e} of {torch.stack(bounds).median():.2e}")
    assert torch.isfinite(torch.stack(errors)).all()
    assert torch.stack(errors).median() <= torch.stack(bounds).median()


@pytest.mark.parametrize("sms", [1, 7, 100])
def test_fewer_sms(sms: int) -> None:
    name = "olmoe"
    rig, tokens = rig_of(name, 600, tied=True), random_tokens(small(name), 513, seed=4)
    whole = rig.first_logits(tokens)
    usual, rig.prefill = rig.prefill, Prefill(rig.state, rig.program(0).sizes, sms)
    rig.state.cache.zero_()
    found = rig.first_logits(tokens)
    rig.prefill = usual
    assert rms(found - whole) <= 0.01 * rms(whole)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_no_number_stays_with_its_request(name: str) -> None:
    """A prompt of NaN leaves numbers in the cache, and the next prompt's bits are its own."""
    rig, tokens = rig_of(name, LONG), random_tokens(small(name), 200, seed=5)
    wanted = rig.first_logits(tokens)
    norms = rig.state.constants.clone()
    rig.state.constants[: small(name).hidden_size] = float("nan")
    rig.start(tokens)
    rig.prefill.launch(0, len(tokens))
    torch.cuda.synchronize()
    assert torch.isfinite(rig.state.cache).all()
    rig.state.constants.copy_(norms)
    assert torch.equal(rig.first_logits(tokens[:150]), rig.first_logits(tokens[:150]))
    assert torch.equal(rig.first_logits(tokens), wanted)


@cache
def quantised(name: str) -> PackedModel:
    """A small mixture in one of the formats."""
    return pack(Weights(tensors_of(name)), small(name), torch.bfloat16, 520, QUANTISED[name])


@pytest.mark.parametrize("name", QUANTISED)
def test_experts_that_have_rows_are_widened(name: str) -> None:
    """To the host's numbers, rounded to bf16; nothing is written for the others."""
    model, config = quantised(name), small(name)
    rig = Rig(model)
    chain, mixture, used = rig.prefill.chain, rig.prefill.chain.mixture, config.experts_per_token
    assert mixture is not None
    rig.read(random_tokens(config, 1))
    ends = chain.tensors["ends"].cpu()
    having = torch.cat((ends[:1], ends.diff())) > 0
    assert int(having.sum()) == used < config.num_experts
    buffer = chain.tensors["widened"]
    for kind in EXPERT_KINDS:
        buffer.fill_(float("nan"))
        mixture.widening(kind, 1).enqueue()
        wanted = [rounded(model, kind, 1, expert) for expert in range(config.num_experts)]
        size = len(wanted[0])
        for expert, found in enumerate(buffer.cpu()[: size * config.num_experts].split(size)):
            assert torch.equal(found, wanted[expert]) if having[expert] else found.isnan().all(), (kind, expert)
        assert buffer[size * config.num_experts :].isnan().all()


@pytest.mark.parametrize("name", QUANTISED)
def test_a_prompt_of_quantised_experts(name: str) -> None:
    """Beside fp32 with the same weights, by what bf16 makes of them, which rounds them as prefill does."""
    model = quantised(name)
    rig, lengths = Rig(model), tuple(length for length in LENGTHS if length < 520)
    config, tensors = numbers(model)
    tokens, places = random_tokens(config, max(lengths)), torch.tensor(lengths) - 1
    true, plain = (reference_of(config, tensors, dtype, tokens)[places] for dtype in (torch.float32, torch.bfloat16))
    read = []
    for length in lengths:
        read.append(rig.first_logits(tokens[:length]))
        assert torch.equal(rig.first_logits(tokens[:length]), read[-1]), "the same bits again"
    ours, bound = rms(torch.stack(read) - true), rms(plain - true)
    tell(f"{name}, quantised", ours, bound)
    assert torch.isfinite(ours).all()
    assert ours.median() <= bound.median()


TRUE_LENGTHS = (1, 2, 17, 64, 65, 127, 129, 200, 255, 300, 333, 384, 400, 450, 500, 511, 512)
TRUE_SHAPES = (*EXPERT_PRESETS, "granite-3.1-3b-a800m", "mixtral-8x7b")


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_true_shapes_are_nearer_to_fp32_than_bf16_is(name: str, preparation: Preparation) -> None:
    """Two layers; the typical length, and the worst of most."""
    if name in preparation.compiled:
        preparation.compiled[name].result()
    config, weights, longest = config_of(name), weights_of(name), max(TRUE_LENGTHS)
    tokens = random_tokens(config, longest)
    rig = Rig(pack(weights, config, torch.bfloat16, longest + 16), BucketPrograms(config, device_sms(), longest + 16, 2))
    ours = torch.stack([rig.first_logits(tokens[:length]) for length in TRUE_LENGTHS])
    del rig
    torch.cuda.empty_cache()
    tensors = dict(weights.tensors())
    true, plain = (reference_of(config, tensors, dtype, tokens) for dtype in (torch.float32, torch.bfloat16))
    places = torch.tensor([length - 1 for length in TRUE_LENGTHS])
    error, bound = rms(ours - true[places]), rms(plain - true)
    tell(name, error, bound)
    assert torch.isfinite(ours).all()
    assert error.median() <= bound.median()
    assert error.quantile(MOST) <= ROUNDINGS * bound.quantile(MOST)


def test_the_engine_keeps_a_beginning() -> None:
    """A second turn reads its own tokens; without reuse the same request has the same answer, as often as it is asked."""
    from megakernel.gpu.backend import CHUNK as LAUNCH
    from megakernel.gpu.backend import GpuBackend

    name, capacity = "qwen3_moe", 512
    model = pack(Weights(tensors_of(name)), small(name), torch.bfloat16, capacity)
    programs = BucketPrograms(small(name), device_sms(), capacity, 2)
    backend: Any = GpuBackend(model, programs, torch.device("cuda", 0), Prefill)
    prompt = random_tokens(small(name), 300, seed=6)
    with Engine(backend, chunk=LAUNCH) as engine:
        first = list(engine.generate(prompt, 20, reuse=False))
        assert len(first) == 20 and list(engine.generate(prompt, 20, reuse=False)) == first
        turn = engine.generate([*prompt, *first[:10], 5, 6, 7], 20)
        assert len(list(turn)) == 20 and turn.kept >= 310
        assert list(engine.generate(prompt, 20, reuse=False)) == first
