"""Prefill's attention, of its own source run on torch, beside a softmax in fp32: where chunks begin, and how wide heads are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakernel.prefill.chain import PAGE_ELEMENTS, Chain
from megakernel.prefill.plan import Plan
from models.config import ModelConfig
from tests.support.gluon.kernel import run

SMS, HEADS, GROUP = 2, 4, 2


def config_of(width: int) -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": HEADS * width, "intermediate_size": 64, "num_layers": 1, "vocab_size": 64}
    return ModelConfig(**sizes, max_position=512, num_heads=HEADS, num_kv_heads=HEADS // GROUP, head_dim=width)


def rows_of(plan: Plan, cache: torch.Tensor, head: int, value: int) -> torch.Tensor:
    """All keys, or values, of a K/V head, fp32 [positions, width]."""
    dimensions, a = plan.dimensions, plan.attention
    pages = cache[(2 * head + value) * dimensions.head_pages :][: dimensions.head_pages]
    return pages.view(-1, a.tiles, a.page_positions, 64).transpose(1, 2).reshape(-1, a.width).float()


@pytest.mark.parametrize(
    ("width", "start", "tokens"), [(64, 0, 300), (64, 70, 330), (64, 127, 2), (64, 100, 1), (128, 65, 190), (256, 33, 100)]
)
def test_a_chunk(width: int, start: int, tokens: int) -> None:
    plan = Plan(config_of(width), SMS, 512)
    generator = torch.Generator().manual_seed(tokens)
    pages = plan.config.num_kv_heads * 2 * plan.dimensions.head_pages
    cache = torch.randn(pages, PAGE_ELEMENTS, generator=generator).bfloat16()
    state = SimpleNamespace(device=torch.device("cpu"), cache=cache, config=plan.config)
    chain = Chain(state, None, plan)  # type: ignore[arg-type]
    chain.queries.normal_(generator=generator)
    chain.mixed.fill_(float("nan"))
    chain.words.copy_(torch.tensor([start, tokens], dtype=torch.int32))
    run(chain.attention(0), seed=tokens)
    stop = start + tokens
    later = torch.arange(stop)[None, :] > torch.arange(start, stop)[:, None]
    for head in range(HEADS):
        keys, values = (rows_of(plan, cache, head // GROUP, value)[:stop] for value in (0, 1))
        queries = chain.queries.view(-1, HEADS, width)[:tokens, head].float()
        scores = (queries @ keys.T * plan.config.attention_scale).masked_fill(later, float("-inf"))
        wanted = scores.softmax(1) @ values
        found = chain.mixed.view(-1, HEADS, width)[:tokens, head].float()
        assert (found - wanted).abs().max() <= 0.02
    assert chain.mixed[tokens:].isnan().all()
