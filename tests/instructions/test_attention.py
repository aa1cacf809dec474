"""Attention and its combination, against a softmax written out in fp64.

Tolerance: probabilities are rounded to the weight type once, which moves each by 2^-9 (bf16) of itself and so the output, a
convex combination of V rows, by at most 2^-9 max |v|; fp32 arithmetic adds some 2^-20 of that.  Scores of size 10 are off by
some 2^-19 in fp32, and so are the probabilities.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.attention import Attention, OnlineSoftmax, cache_rows
from instructions.combine import Combine
from instructions.matvec import DTYPES
from instructions.shape import Shape
from tests.support.fake_machine import FakeMachine, small_shape

ROUNDING = {2: 2.0**-9, 4: 0.0}
FP32 = 2.0**-16


def fill_cache(machine: FakeMachine, layer: int, seed: int = 0) -> torch.Tensor:
    """Random K and V for all past positions and the current one, fp64 [kv_heads, 2, past + 1, dp]; pages laid out as
    [head_tiles][positions][tile_columns], what lies behind the last past position left NaN."""
    shape, past = machine.shape, machine.past
    dp, heads, dtype = shape.head_rows, shape.config.num_kv_heads, DTYPES[shape.itemsize]
    values = torch.randn(heads, 2, past + 1, dp, generator=torch.Generator().manual_seed(seed)).to(dtype)
    padded = torch.zeros(heads, 2, past, shape.head_tiles * shape.tile_columns, dtype=dtype)
    padded[..., :dp] = values[:, :, :past]
    for head in range(heads):
        for which in (0, 1):
            for position in range(past):
                page, row = divmod(position, shape.page_positions)
                view = machine.cache[shape.cache_page(layer, head, which) + page].view(
                    shape.head_tiles, shape.page_positions, -1
                )
                view[:, row] = padded[head, which, position].view(shape.head_tiles, -1)
    machine.rows["new_kv", layer].copy_(values[:, :, past].float().flatten())
    return values.double()


def fill_queries(machine: FakeMachine, layer: int, scale: float = 1.0) -> torch.Tensor:
    """Random fp32 queries; returned rounded, fp64 [kv_heads, group, dp]."""
    rows, config = machine.rows["q", layer], machine.shape.config
    rows.copy_(scale * torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)))
    return rows.to(DTYPES[machine.shape.itemsize]).double().view(config.num_kv_heads, config.group, -1)


def softmax_ref(q: torch.Tensor, kv: torch.Tensor, shape: Shape) -> torch.Tensor:
    """fp64 [kv_heads, group, dp]: softmax(q k / sqrt(head_dim)) v."""
    scores = torch.einsum("hgd,htd->hgt", q, kv[:, 0]) * shape.config.head_dim**-0.5
    return torch.einsum("hgt,htd->hgd", torch.softmax(scores, dim=-1), kv[:, 1])


def run_attention(machine: FakeMachine, layer: int) -> torch.Tensor:
    """All heads and slices, and their combination; fp32 [kv_heads, group, dp]."""
    shape, config = machine.shape, machine.shape.config
    for head in range(config.num_kv_heads):
        for index in range(shape.slices):
            machine.run(Attention(layer, head, index))
        if shape.slices > 1:
            machine.run(Combine(layer, head))
    return machine.rows["attn", layer].view(config.num_kv_heads, config.group, -1)


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("past", [0, 1, 63, 64, 65, 127, 128, 129, 200, 256])
@pytest.mark.parametrize("name", ["mha", "gqa4_llama3_tied", "head128", "head24_odd_blocks"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_attention_is_a_softmax(name: str, itemsize: int, past: int, slices: int) -> None:
    machine = FakeMachine(small_shape(name, itemsize, slices), past)
    layer = machine.shape.config.num_layers - 1
    kv, q = fill_cache(machine, layer), fill_queries(machine, layer)
    wanted = softmax_ref(q, kv, machine.shape)
    ours = run_attention(machine, layer)
    assert (ours - wanted).abs().max() <= (ROUNDING[itemsize] + FP32) * kv[:, 1].abs().max()


@pytest.mark.parametrize("itemsize", [2, 4])
def test_large_scores_do_not_overflow(itemsize: int) -> None:
    """Scores of some hundreds, whose exponentials no fp32 holds: only differences to the maximum may be taken."""
    machine = FakeMachine(small_shape("gqa2", itemsize, slices=2), past=130)
    kv, q = fill_cache(machine, 0), fill_queries(machine, 0, scale=300.0)
    ours, wanted = run_attention(machine, 0), softmax_ref(q, kv, machine.shape)
    # scores of size 1000 are off by 1000 * 2^-22 in fp32, and the probabilities with them
    assert (ours - wanted).abs().max() <= (ROUNDING[itemsize] + 2**-11) * kv[:, 1].abs().max()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32), st.booleans())
def test_online_softmax_does_not_depend_on_the_chunks(chunks: list[int], seed: int, low: bool) -> None:
    """Beyond rounding: fp32 and no rounding of probabilities, chunks of positions added one after another."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(chunks)
    q, k, v = (torch.randn(n, 16, generator=generator) * (30.0 if low else 1.0) for n in (3, count, count))
    online = OnlineSoftmax(3, 16, 0.25)
    for keys, values in zip(k.split(chunks), v.split(chunks), strict=True):
        online.add(q, keys, values, torch.float32)
    scores = (q.double() @ k.double().T) * 0.25
    wanted = torch.softmax(scores, 1) @ v.double()
    # a score is a sum of 16 products: in fp32 it is off by 16 * 2^-24 of what their sizes sum up to
    off = float((q.double().abs() @ k.double().abs().T).max()) * 0.25 * 2**-20
    allowed = (2**-18 + 4 * off) * float(v.abs().max())
    assert (online.normalised().view(3, 16) - wanted).abs().max() <= allowed
    m, total, o = online.partial().split([3, 3, 48])
    assert torch.allclose(o.view(3, 16) / total[:, None], online.normalised().view(3, 16))
    assert (m.double() - scores.amax(1)).abs().max() <= 2**-18 + off


def test_combining_one_slice_with_empty_ones_changes_nothing() -> None:
    """Empty slices have maximum -inf and weight 0; the rest comes out as that slice alone would have."""
    shape = small_shape("gqa4_llama3_tied", slices=3)
    machine = FakeMachine(shape, past=0)  # no page: slices 0 and 1 are empty, the last has the current position
    kv, _ = fill_cache(machine, 0), fill_queries(machine, 0)
    ours = run_attention(machine, 0)
    assert torch.equal(ours, kv[:, 1].float().expand_as(ours)), "with one position the output is its V row, exactly"


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("past", [0, 1, 65, 200])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_head24_bias", "qwen3_head128"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_heads_are_normed_by_their_reader(name: str, itemsize: int, past: int, slices: int) -> None:
    """Queries and this token's key times 1 / sqrt(mean y^2 + eps) of their heads; the key as it then is goes to the cache."""
    machine = FakeMachine(small_shape(name, itemsize, slices), past)
    shape, config, layer = machine.shape, machine.shape.config, machine.shape.config.num_layers - 1
    dtype, generator = DTYPES[itemsize], torch.Generator().manual_seed(8)
    kv, _ = fill_cache(machine, layer), fill_queries(machine, layer)
    squares = machine.rows["squares", layer].view(config.num_kv_heads, config.group + 1, -1)
    squares.copy_(torch.rand(squares.shape, generator=generator) * 3 * config.head_dim)
    factors = (squares.double().sum(2) / config.head_dim + config.rms_eps).rsqrt().float()
    q = machine.rows["q", layer].view(config.num_kv_heads, config.group, -1) * factors[:, :-1, None]
    key = machine.rows["new_kv", layer].view(config.num_kv_heads, 2, -1)[:, 0] * factors[:, -1:]
    kv[:, 0, past] = key.to(dtype).double()
    ours, wanted = run_attention(machine, layer), softmax_ref(q.to(dtype).double(), kv, shape)
    # a query or key on the other side of a tie moves a score by 2^-8 of one of its products
    assert (ours - wanted).abs().max() <= 2 * (ROUNDING[itemsize] + FP32) * kv[:, 1].abs().max()
    cached = machine.rows["kv", layer].view(config.num_kv_heads, 2, -1)
    assert (cached[:, 0] - key).abs().max() <= 4 * 2**-24 * key.abs().max()
    assert cached[:, 1].isnan().all(), "values are stored by who makes them"


def test_slices_are_summed_in_order_of_their_index() -> None:
    """fp32 sums depend on their order, so the order is fixed: ((a + b) + c), whichever slice was done first."""
    shape = small_shape("mha", slices=3)
    machine = FakeMachine(shape)
    group, dp = shape.config.group, shape.head_rows
    generator = torch.Generator().manual_seed(3)
    partial = torch.randn(3, shape.partial_rows, generator=generator)
    partial[:, group : 2 * group] = partial[:, group : 2 * group].abs() + 1
    machine.rows["partial", 0][: 3 * shape.partial_rows] = partial.flatten()
    machine.run(Combine(0, 0))
    m, total, o = partial.split([group, group, group * dp], dim=1)
    weight = torch.exp(m - m.amax(0))
    numerator = (weight[0, :, None] * o[0].view(group, dp) + weight[1, :, None] * o[1].view(group, dp)) + (
        weight[2, :, None] * o[2].view(group, dp)
    )
    wanted = numerator / ((weight[0] * total[0] + weight[1] * total[1]) + weight[2] * total[2])[:, None]
    assert torch.equal(machine.rows["attn", 0][: group * dp], wanted.flatten())


@pytest.mark.parametrize(("name", "itemsize", "tiles", "positions"), [
    ("mha", 2, 1, 128), ("head64_llama3", 2, 1, 128), ("head64_llama3", 4, 2, 64), ("head128", 2, 2, 64), ("head128", 4, 4, 32),
])  # fmt: skip
def test_page_layout(name: str, itemsize: int, tiles: int, positions: int) -> None:
    """A page is 128 rows of 128 bytes: as many side by side as one head needs, a power of two."""
    shape = small_shape(name, itemsize)
    assert (shape.head_tiles, shape.page_positions) == (tiles, positions)
    page = torch.arange(shape.page_elements).float()
    rows = cache_rows(page, shape)
    assert rows.shape == (positions, shape.head_rows)
    for position in (0, positions - 1):
        for dim in (0, shape.head_rows - 1):
            tile, column = divmod(dim, shape.tile_columns)
            assert rows[position, dim] == (tile * positions + position) * shape.tile_columns + column
