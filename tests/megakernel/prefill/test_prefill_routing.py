"""Which experts tokens take, and where their rows go: the kernels, the reference, the CPU machine and transformers agree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.choose import Choose
from instructions.dimensions import ceil_div
from megakernel.prefill.reference import permute, route
from megakernel.prefill.tiling import ROUTED
from models.tape import BLOCK_ROWS
from tests.support.configs import MIXTURES, SMALL_CONFIGS, make_model, small_config
from tests.support.gluon.kernel import launch, package
from tests.support.gluon.language import constant

NOBODY = -77


def routed(scores: torch.Tensor, chosen: int, renormalised: bool, programs: int) -> tuple[torch.Tensor, ...]:
    """The kernels' experts, shares, places and ends; every place was filled with what is nobody's."""
    tokens, count = scores.shape
    experts_of = SimpleNamespace(total=constant(count), chosen=constant(chosen), renormalised=renormalised)
    sizes = SimpleNamespace(experts=experts_of)
    words = torch.tensor([5, tokens], dtype=torch.int32)
    padded = torch.full((tokens + 3, BLOCK_ROWS * ceil_div(count, BLOCK_ROWS)), torch.nan)
    padded[:tokens, :count] = scores
    slots, places, ends, counts = (
        torch.full(shape, NOBODY, dtype=torch.int32)
        for shape in ((tokens + 3, count), (tokens + 3, chosen), (count,), (ceil_div(tokens, ROUTED) + 1, count))
    )
    shares = torch.full((tokens + 3, chosen), torch.nan)
    routing = package()["megakernel.device.prefill.routing"]
    launch(routing.read_choice, programs, (words, padded, slots, shares, counts, sizes))
    launch(routing.read_places, programs, (words, slots, counts, places, ends, sizes))
    assert (slots[tokens:] == NOBODY).all() and (places[tokens:] == NOBODY).all() and shares[tokens:].isnan().all()
    found = slots[:tokens]
    experts = torch.stack([(found == slot).int().argmax(1) for slot in range(chosen)], 1)
    assert (found.sort(1, descending=True).values[:, chosen:] == -1).all(), "others have no slot"
    return experts, shares[:tokens], places[:tokens], ends


def check(scores: torch.Tensor, chosen: int, renormalised: bool, programs: int) -> None:
    experts, shares, places, ends = routed(scores, chosen, renormalised, programs)
    wanted, wanted_shares = route(scores, chosen, renormalised)
    assert torch.equal(experts, wanted)
    torch.testing.assert_close(shares, wanted_shares)
    rows, stops = permute(wanted, scores.shape[1])
    assert torch.equal(places.long(), rows) and torch.equal(ends.long(), stops)
    assert sorted(places.flatten().tolist()) == list(range(places.numel())), "every row is one slot's"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_kernels_are_the_reference(data: st.DataObject) -> None:
    """Scores of few values, so that many are equal, and of many; experts that nobody takes."""
    count = data.draw(st.sampled_from([1, 2, 7, 16, 17, 40, 128]), "experts")
    chosen = data.draw(st.integers(1, min(count, 9)), "chosen")
    tokens = data.draw(st.sampled_from([1, 2, 15, 31, 32, 33, 63, 64, 65, 100]), "tokens")
    seed, values = data.draw(st.integers(0, 99), "seed"), data.draw(st.sampled_from([1, 2, 5, 1000]), "values")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(values, (tokens, count), generator=generator) / values * 6 - 3
    scores *= torch.where(torch.rand(scores.shape, generator=generator) < 0.1, -0.0, 1.0)
    scores[:, : count // 3] -= 50.0 * data.draw(st.booleans(), "some are never taken")
    check(scores, chosen, data.draw(st.booleans(), "renormalised"), data.draw(st.sampled_from([1, 3, 50]), "programs"))


@pytest.mark.parametrize("renormalised", [False, True])
def test_scores_that_are_no_numbers_lead_nowhere_else(renormalised: bool) -> None:
    """Every token still has different experts, every slot a row of its own, and the other tokens' are as they were."""
    scores = torch.randn(70, 17, generator=torch.Generator().manual_seed(3))
    scores[5], scores[6, 3:9], scores[33, ::2] = torch.nan, torch.nan, torch.inf
    scores[64], scores[69, 1:] = -torch.inf, -torch.nan
    experts, shares, places, ends = routed(scores, 4, renormalised, 3)
    assert all(len(set(chosen)) == 4 for chosen in experts.tolist())
    assert sorted(places.flatten().tolist()) == list(range(280)) and int(ends[-1]) == 280
    assert torch.equal(ends, torch.bincount(experts.flatten(), minlength=17).cumsum(0).int())
    usual = scores.isfinite().all(1)
    wanted, wanted_shares = route(scores[usual], 4, renormalised)
    assert torch.equal(experts[usual], wanted)
    torch.testing.assert_close(shares[usual], wanted_shares)


def test_many_tiles_of_tokens() -> None:
    check(torch.randn(ROUTED * (ROUTED + 2) + 1, 40, generator=torch.Generator().manual_seed(0)), 8, True, 7)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_reference_is_the_cpu_machine_s_choice(name: str) -> None:
    """Equal scores and both zeros too."""
    config = small_config(name)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(-3, 4, (50, config.num_experts), generator=generator) / 2
    scores[scores == 0] *= torch.where(torch.rand(int((scores == 0).sum()), generator=generator) < 0.5, -1.0, 1.0)
    experts, shares = route(scores, config.experts_per_token, config.renormalised)
    for token, row in enumerate(scores):
        written: list[torch.Tensor] = []
        machine: Any = SimpleNamespace(
            shape=SimpleNamespace(config=config),
            read=lambda region, row=row: row,
            write=lambda region, values, written=written: written.append(values),
        )
        assert list(Choose(0).execute(machine)) == []
        numbers, weights = written[0].split(config.experts_per_token)
        assert numbers.tolist() == experts[token].tolist()
        torch.testing.assert_close(weights, shares[token])


@pytest.mark.parametrize("name", MIXTURES)
def test_the_reference_is_transformers_router(name: str) -> None:
    config = small_config(name)
    assert SMALL_CONFIGS[name]["model_type"] == config.family
    model = make_model(name)
    [router, *_] = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hidden = torch.randn(60, config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores, weights, experts = router(hidden)
    assert scores.dtype == torch.float32 and (scores - hidden @ router.weight.T).abs().max() < 1e-4
    found, shares = route(hidden @ router.weight.detach().T, config.experts_per_token, config.renormalised)
    assert torch.equal(found, experts)
    torch.testing.assert_close(shares, weights)
