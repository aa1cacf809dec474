"""Lowering: row blocks are split evenly and completely, whatever the number of SMs, and nothing is missing from a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.attention import Attention
from instructions.hand_over import HandOver
from instructions.qkv import Qkv
from instructions.shape import Shape, ceil_div
from models.config import ModelConfig
from models.families import PRESETS
from scheduler.build import make_shape
from scheduler.errors import ScheduleError
from scheduler.lower import lower, split_blocks
from tests.support.configs import small_config
from tests.support.program_cases import configs, lowered, shapes


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 200))
def test_a_split_covers_every_block_once_in_even_runs(parts: list[int], sms: int) -> None:
    runs = list(split_blocks(parts, sms))
    share = ceil_div(sum(parts), sms)
    assert [block for first, count in runs for block in range(first, first + count)] == list(range(sum(parts)))
    assert all(1 <= count <= share for _, count in runs)
    assert len(runs) <= max(sms, sum(ceil_div(part, share) for part in parts)), "more runs than SMs, and no edge asks for them"
    edge = 0
    for part in parts:
        inside = [count for first, count in runs if edge <= first < edge + part]
        assert sum(inside) == part, "a run crosses the edge of a part"
        assert max(inside) - min(inside) <= 1
        edge += part


@given(st.integers(1, 3000), st.integers(1, 200))
def test_one_part_is_split_over_all_sms(blocks: int, sms: int) -> None:
    assert len(list(split_blocks([blocks], sms))) == min(blocks, sms)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 200))
def test_every_row_of_every_buffer_is_written_exactly_once(data: st.DataObject, sms: int) -> None:
    shape = data.draw(shapes(sms))
    written: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for instruction in lower(shape, sms):
        for region in instruction.writes(shape):
            written.setdefault((region.buffer, region.layer), []).append((region.start, region.stop))
    for name, buffer in shape.buffers.items():
        used = buffer.rows if name != "best" else None  # as many slots as LM-head instructions
        beginning = 0 if buffer.layers == 1 else shape.first_layer  # a tail leaves out the layers before its own
        for layer in range(beginning, buffer.layers if buffer.rows else 0):
            edges = sorted(written.pop((name, layer)))
            assert edges[0][0] == 0
            assert all(stop == start for (_, stop), (start, _) in zip(edges, edges[1:], strict=False))
            assert used is None or edges[-1][1] == used
    assert not written, "a buffer is written that the shape does not list"


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 200))
def test_every_streamed_page_of_the_tape_is_used_exactly_once(data: st.DataObject, sms: int) -> None:
    """Weights in HBM are read once a token: a page read twice, or padding, would show in the step time.

    Of experts as many as are chosen, here those with the lowest numbers.
    """
    shape = data.draw(shapes(sms))
    pages: Counter[int] = Counter()
    for instruction in lower(shape, sms):
        if not isinstance(instruction, Attention):
            for first, stop in instruction.streams(shape):
                pages.update(range(first, stop))
    streamed = range(shape.matrix("qkv", shape.first_layer).first_page, shape.tape.streamed_pages)
    assert pages == Counter(streamed) - Counter(not_chosen(shape))


def not_chosen(shape: Shape) -> Iterator[int]:
    """Pages of the experts beyond as many as are chosen."""
    for matrix in shape.tape.matrices:
        if matrix.kind.startswith("expert_") and matrix.expert >= shape.config.experts_per_token:
            yield from range(matrix.first_page, matrix.first_page + matrix.pages)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 64))
def test_attention_covers_the_past_once_at_every_position(data: st.DataObject, sms: int) -> None:
    """Whatever the position within the bucket, each page of past K and V is streamed by one slice."""
    shape = data.draw(shapes(sms))
    past = data.draw(st.integers(0, shape.bucket))
    attention = [i for i in lower(shape, sms) if isinstance(i, Attention)]
    streamed: Counter[int] = Counter()
    for instruction in attention:
        tape = instruction.tape_page(shape)
        sources = [instruction.page_source(shape, tape, use, past) for use in range(instruction.page_uses(shape))]
        assert all(source is None or source.space == "kv" for source in sources)
        streamed.update(source.index for source in sources if source)
    config, used = shape.config, ceil_div(past, shape.page_positions)
    wanted = {
        shape.cache_page(layer, head, value) + page
        for layer in range(shape.first_layer, config.num_layers)
        for head in range(config.num_kv_heads)
        for value in (0, 1)
        for page in range(used)
    }
    assert streamed == Counter(wanted)
    assert sum(i.cost(shape, past).bytes for i in attention) == 16384 * len(wanted)


@given(configs(), st.integers(1, 200))
def test_costs_add_up_to_the_weights(config: ModelConfig, sms: int) -> None:
    """All bytes of a first token are the streamed tape and one embedding row; the operations two per weight, padding in.  A
    page of which only half is read counts whole, as it does in the ring."""
    shape = make_shape(config, sms=sms, capacity=64, bucket=64, slices=1)
    costs = [instruction.cost(shape, 0) for instruction in lower(shape, sms)]
    streamed = shape.tape.streamed_pages - len(list(not_chosen(shape)))
    halves = 0
    if shape.tape.halved:
        halves = config.num_layers * config.experts_per_token * shape.tape.matrix("expert_down").blocks
    assert shape.tape.streamed_bytes == streamed * 16384 - halves * 8192
    assert sum(cost.bytes for cost in costs) == streamed * 16384 + config.hidden_size * shape.itemsize
    slots, compared = costs[-1].flops // 2, config.num_layers * config.num_experts**2
    assert sum(cost.flops for cost in costs) == 2 * streamed * shape.page_elements + 2 * slots + compared


@pytest.mark.parametrize("sms", [1, 2, 7, 131, 132, 200])
@pytest.mark.parametrize("name", ["head24_odd_blocks", "ragged_sizes", "all_biases_linear_head24"])
def test_qkv_runs_never_mix_queries_with_keys_and_values(name: str, sms: int) -> None:
    """An attention waits for its query rows and its K and V rows apart, so no instruction may make some of both."""
    shape = make_shape(small_config(name), sms=sms, capacity=256, bucket=256)
    for instruction in lower(shape, sms):
        if isinstance(instruction, Qkv):
            buffers = {region.buffer for region in instruction.writes(shape)}
            assert buffers in ({"q"}, {"new_kv", "kv"})


def test_slices_follow_the_sms_and_the_bucket() -> None:
    config = PRESETS["llama-3.2-1b"]  # 8 KV heads, 128 positions a page

    def slices(sms: int, bucket: int) -> int:
        return make_shape(config, sms=sms, capacity=8192, bucket=bucket).slices

    assert slices(132, 512) == 1, "four pages are not worth sharing"
    assert slices(132, 513) == 2
    assert slices(132, 8192) == 16, "132 SMs hold 16 slices of 8 heads"
    assert slices(7, 8192) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sms": 0}, "0 SMs"),
        ({"sms": 201}, "201 SMs"),
        ({"itemsize": 1}, "weights of 1 bytes"),
        ({"bucket": 0}, "bucket of 0"),
        ({"bucket": 257}, "bucket of 257 positions in a KV cache of 256"),
        ({"slices": 0}, "0 attention slices"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        make_shape(small_config("mha"), **({"sms": 4, "capacity": 256, "bucket": 256} | wrong))
    assert "\n" not in str(caught.value)


def test_rounding_to_whole_kv_pages() -> None:
    shape = make_shape(small_config("mha"), sms=4, capacity=130, bucket=1)
    assert isinstance(shape, Shape)
    assert (shape.page_positions, shape.capacity, shape.bucket) == (128, 256, 128)


def test_program_order_is_that_of_the_layers() -> None:
    program = lowered(make_shape(small_config("gqa2"), sms=3, capacity=256, bucket=256), 3).instructions
    kinds = list(dict.fromkeys((i.layer, i.MNEMONIC) for i in program))
    layer = ["qkv", "attention", "o_proj", "gate_up", "down"]
    body = [(number, kind) for number in (0, 1) for kind in layer]
    assert kinds == [(0, "embed"), *body, (0, "lm_head"), (0, "sample")]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_tail_is_the_last_layer_and_the_head(layers: int) -> None:
    """Cut into the same runs as in the program of the whole token, but for the hand-over that it begins with."""
    config = replace(small_config("gqa2"), num_layers=layers)
    whole, tail = (lower(make_shape(config, sms=3, capacity=256, bucket=256, tail=tail), 3) for tail in (False, True))
    last = config.num_layers - 1
    rest = [item for item in whole if item.layer == last and item.LAYERED] + [item for item in whole[1:] if not item.LAYERED]
    assert tail == [HandOver(last), *rest]
