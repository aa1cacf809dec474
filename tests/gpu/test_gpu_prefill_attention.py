"""Attention of a chunk alone: right whatever the scores, and the same bits however a prompt is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bench.rig import device_sms
from megakernel.prefill.chain import PAGE_ELEMENTS, Chain
from megakernel.prefill.plan import Plan
from megakernel.prefill.tiling import STEP, AttentionTiling
from models.config import ModelConfig

pytestmark = pytest.mark.gpu

HEADS = ((32, 8, 64), (8, 2, 128), (16, 16, 32), (4, 1, 80), (2, 1, 256), (5, 1, 36))  # query, key and value heads, elements
CAPACITY = 4224
LAYERS = 2
ROUNDINGS = 2.0**-7  # of the largest value: a weight and the result are each rounded to bf16, by 2^-9 at most, and sums of them


class Heads:
    """Random queries of `CAPACITY` tokens, and a cache that holds as many keys and values of two layers."""

    def __init__(self, heads: tuple[int, int, int]) -> None:
        query, key_value, dim = heads
        sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_layers": LAYERS, "vocab_size": 300}
        self.config = ModelConfig(**sizes, num_heads=query, num_kv_heads=key_value, head_dim=dim, max_position=8192)
        self.plan = Plan(self.config, device_sms(), CAPACITY)
        pages = LAYERS * key_value * 2 * self.plan.dimensions.head_pages
        generator = torch.Generator("cuda").manual_seed(3)
        cache = torch.empty(pages, PAGE_ELEMENTS, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        state = SimpleNamespace(device=torch.device("cuda"), cache=cache, config=self.config)
        self.chain = Chain(cast(Any, state), cast(Any, None), self.plan)
        self.queries = torch.empty(CAPACITY, self.chain.queries.shape[1], dtype=torch.bfloat16, device="cuda")
        self.queries.normal_(generator=generator)

    def rows(self, head: int, value: int) -> torch.Tensor:
        """A view of layer 1's keys or values of one head [tile, page, position, column]."""
        first = ((self.config.num_kv_heads + head) * 2 + value) * self.plan.dimensions.head_pages
        pages, a = self.chain.state.cache[first : first + self.plan.dimensions.head_pages], self.plan.attention
        elements = a.tiles * a.page_positions * STEP
        return pages[:, :elements].view(-1, a.tiles, a.page_positions, STEP).transpose(0, 1)

    def enlarge(self, positions: list[int], times: float) -> None:
        """The keys at some positions of all heads grow."""
        a = self.plan.attention
        for head in range(self.config.num_kv_heads):
            keys = self.rows(head, 0)
            for position in positions:
                keys[:, position // a.page_positions, position % a.page_positions] *= times

    def run(self, start: int, count: int, past: AttentionTiling | None = None) -> torch.Tensor:
        """Results of `count` queries from position `start` on, bf16 [count, heads, head rows]; by parts of the keys, if so."""
        self.chain.queries[:count] = self.queries[start : start + count]
        self.chain.words.copy_(torch.tensor([start, count], dtype=torch.int32))
        self.chain.mixed.zero_()
        launches = [self.chain.attention(1)] if past is None else self.chain.attention_of_past(count, 1, past)
        for launch in launches:
            launch.enqueue()
        torch.cuda.synchronize()
        return self.chain.mixed[:count].view(count, self.config.num_heads, -1).clone()

    def truth(self, head: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 results of a query head, and the largest value of its head."""
        a, kv = self.plan.attention, head // self.config.group
        keys, values = (
            self.rows(kv, value).permute(1, 2, 0, 3).reshape(-1, self.plan.head_width)[: start + count].float()
            for value in (0, 1)
        )
        queries = self.queries.view(CAPACITY, self.config.num_heads, -1)[start : start + count, head].float()
        scores = queries @ keys.T * a.scale
        later = torch.arange(start + count, device="cuda")[None, :] > torch.arange(start, start + count, device="cuda")[:, None]
        found = torch.softmax(scores.masked_fill(later, float("-inf")), 1) @ values
        return found[:, : a.head_rows], values.abs().amax()


def check(heads: Heads, start: int, count: int, past: AttentionTiling | None = None) -> None:
    found = heads.run(start, count, past)
    for head in range(heads.config.num_heads):
        truth, largest = heads.truth(head, start, count)
        assert (found[:, head].float() - truth).abs().max() <= ROUNDINGS * largest, f"head {head}"


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 129), (127, 1000), (128, 500), (200, 700), (0, 4096), (4095, 129)])
def test_the_results_are_those_of_softmax(shape: tuple[int, int, int], start: int, count: int) -> None:
    check(Heads(shape), start, count)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("times", [30.0, 3000.0])
def test_scores_may_exceed_those_of_the_first_block_by_any_amount(shape: tuple[int, int, int], times: float) -> None:
    """Single keys of early positions, whose scores are hundreds and tens of thousands, in both directions."""
    heads = Heads(shape)
    heads.enlarge([0, 5, 130, 131, 640, 1500], times)
    check(heads, 0, 2000)
    check(heads, 777, 1111)


@pytest.mark.parametrize("shape", [(32, 8, 64), (8, 2, 128), (4, 1, 80), (2, 1, 256)])
@pytest.mark.parametrize("times", [1.0, 30.0, 3000.0])
def test_few_tokens_after_a_long_past(shape: tuple[int, int, int], times: float) -> None:
    """By parts of the keys, in as many as each class has; twice, with the same bits."""
    heads = Heads(shape)
    heads.enlarge([0, 130, 1500, 4001], times)
    for start, count in ((2048, 1), (4000, 50), (4100, 124), (3000, 256), (3968, 129)):
        past = heads.plan.past(next(size for size in heads.plan.classes if count <= size))
        assert past is not None and past.parts > 1
        check(heads, start, count, past)
        assert torch.equal(heads.run(start, count, past), heads.run(start, count, past))


@pytest.mark.parametrize("times", [1.0, 30.0])
@pytest.mark.parametrize("shape", HEADS)
def test_the_bits_do_not_depend_on_the_cut(shape: tuple[int, int, int], times: float) -> None:
    """Nor on whether another query of the same SM has scores that make it do its tiles once more."""
    heads = Heads(shape)
    heads.enlarge([3, 700], times)
    whole = heads.run(0, 2048)
    for start in (1, 64, 127, 300, 640, 1000, 2047):
        assert torch.equal(heads.run(start, 2048 - start), whole[start:]), f"from {start}"
    assert torch.equal(heads.run(0, 900), whole[:900])


def test_a_query_that_no_number_comes_of_harms_no_other() -> None:
    heads = Heads(HEADS[0])
    before = heads.run(0, 1024)
    heads.queries[500] = float("nan")
    after = heads.run(0, 1024)
    others = [row for row in range(1024) if row != 500]
    assert after[500].isnan().all() and torch.equal(before[others], after[others])
