"""Prefill's attention, of its own source run on torch, beside a softmax in fp32: where chunks begin, and how wide heads are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakernel.prefill.chain import PAGE_ELEMENTS, Chain
from megakernel.prefill.launch import Launch
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


class Heads:
    """Random queries and a cache that holds as many keys and values, in one layer."""

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.plan = width, Plan(config_of(width), SMS, 512)
        generator = torch.Generator().manual_seed(seed)
        pages = self.plan.config.num_kv_heads * 2 * self.plan.dimensions.head_pages
        self.cache = torch.randn(pages, PAGE_ELEMENTS, generator=generator).bfloat16()
        state = SimpleNamespace(device=torch.device("cpu"), cache=self.cache, config=self.plan.config)
        self.chain = Chain(state, None, self.plan)  # type: ignore[arg-type]
        self.chain.queries.normal_(generator=generator)
        self.chain.mixed.fill_(float("nan"))

    def check(self, start: int, tokens: int, launches: Iterable[Launch]) -> None:
        """Run the attention of a chunk, and compare with a softmax."""
        self.chain.words.copy_(torch.tensor([start, tokens], dtype=torch.int32))
        for number, launch in enumerate(launches):
            run(launch, seed=tokens + number)
        stop = start + tokens
        later = torch.arange(stop)[None, :] > torch.arange(start, stop)[:, None]
        for head in range(HEADS):
            keys, values = (rows_of(self.plan, self.cache, head // GROUP, value)[:stop] for value in (0, 1))
            queries = self.chain.queries.view(-1, HEADS, self.width)[:tokens, head].float()
            scores = (queries @ keys.T * self.plan.config.attention_scale).masked_fill(later, float("-inf"))
            wanted = scores.softmax(1) @ values
            found = self.chain.mixed.view(-1, HEADS, self.width)[:tokens, head].float()
            assert (found - wanted).abs().max() <= 0.02
        assert self.chain.mixed[tokens:].isnan().all()


@pytest.mark.parametrize(
    ("width", "start", "tokens"), [(64, 0, 300), (64, 70, 330), (64, 127, 2), (64, 100, 1), (128, 65, 190), (256, 33, 100)]
)
def test_a_chunk(width: int, start: int, tokens: int) -> None:
    heads = Heads(width, seed=tokens)
    heads.check(start, tokens, [heads.chain.attention(0)])


@pytest.mark.parametrize(
    ("width", "start", "tokens", "parts"),
    [(64, 400, 50, 2), (64, 300, 130, 4), (64, 511, 1, 8), (64, 0, 3, 8), (128, 250, 64, 4), (256, 100, 65, 2)],
)
@pytest.mark.parametrize("times", [1.0, 300.0])
def test_few_tokens_after_a_long_past(width: int, start: int, tokens: int, parts: int, times: float) -> None:
    """Keys in parts, some of them empty; with keys so large that sums must be begun anew."""
    heads = Heads(width, seed=tokens)
    keys = heads.cache.view(-1, heads.plan.dimensions.head_pages, PAGE_ELEMENTS)[0::2]
    keys[:, 0, :64] *= times
    rows = -(-tokens // 64) * 64 * HEADS * parts
    heads.chain.tensors |= {"past": torch.full((rows, width), float("nan")), "past_sums": torch.full((rows, 2), float("nan"))}
    tiling = replace(heads.plan.attention, parts=parts)
    heads.check(start, tokens, heads.chain.attention_of_past(tokens, 0, tiling))
