"""What prefill's kernels are told: every chunk has a class, every product fits its tiles, and memory is what is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megakernel.prefill.plan import BUFFERS, CHUNK, CLASSES, EXPERT_KINDS, KINDS, Plan
from megakernel.prefill.tiling import CONSUMER_TOKENS, RING_BYTES, ROUTED, SHAPES, STEP, Cut, choose_cut
from models.config import ModelConfig
from models.families import PRESETS
from models.formats import Formats
from models.tape import BLOCK_ROWS

BASE = PRESETS["llama-3.2-1b"]
DENSE = [name for name, config in PRESETS.items() if not config.num_experts]
MIXTURES = [name for name in PRESETS if name not in DENSE]


@pytest.mark.parametrize("name", PRESETS)
def test_every_class_of_every_preset(name: str) -> None:
    plan = Plan(PRESETS[name], 132, 4096)
    assert plan.possible
    assert plan.classes == CLASSES
    for size in plan.classes:
        for kind in plan.kinds:
            cut, matrix = plan.cut(size, kind), plan.tape.matrix(kind)
            tiling = plan.tiling(kind, cut)
            assert (cut.tokens, cut.tile) in SHAPES
            assert 1 <= cut.split <= matrix.pages_per_block * 8
            assert 2 <= tiling.slots <= RING_BYTES // ((cut.tokens + cut.tile) * STEP * 2)
            assert tiling.consumers * CONSUMER_TOKENS == cut.tokens
            if cut.split > 1:
                assert plan.tiles(size, kind) * cut.split * cut.tokens * cut.tile <= plan.parts
                assert plan.tiles(size, kind) * tiling.consumers <= plan.arrivals


@pytest.mark.parametrize(
    ("capacity", "classes"), [(1, 1), (64, 1), (65, 2), (128, 2), (500, 4), (4095, 7), (4096, 7), (131072, 7)]
)
def test_no_longer_chunks_than_the_cache_holds(capacity: int, classes: int) -> None:
    plan = Plan(BASE, 132, capacity)
    assert plan.classes == CLASSES[:classes]
    assert plan.chunk == min(CHUNK, plan.classes[-1])


@pytest.mark.parametrize("tile", [64, 128, 256])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3-8b", "smollm2-135m", "qwen2.5-7b"])
def test_tiles_of_keys_and_values_are_all_that_hold_one(name: str, tile: int) -> None:
    plan = Plan(PRESETS[name], 132, 4096)
    group, head_blocks = plan.config.group, plan.dimensions.head_blocks
    held = {
        block * BLOCK_ROWS // tile
        for block in range(plan.tape.matrix("qkv").blocks)
        if block // head_blocks % (group + 2) >= group
    }
    assert plan.key_value_tiles(tile) == sorted(held)


def test_heads_that_do_not_fit_are_left_to_decode() -> None:
    def possible(**sizes: object) -> bool:
        return Plan(replace(BASE, **sizes), 132, 1024).possible  # type: ignore[arg-type]

    assert possible(head_dim=256)
    assert not possible(head_dim=258)
    assert possible(head_dim=80)
    assert possible(family="qwen3", head_dim=128)
    assert not possible(family="qwen3", head_dim=80), "a tile of 128 rows does not hold whole heads"
    assert not possible(family="qwen3", head_dim=256)


def test_normed_heads_are_whole_in_their_tiles() -> None:
    plan = Plan(PRESETS["qwen3-0.6b"], 132, 4096)
    assert all(plan.cut(size, "qkv").tile >= plan.dimensions.head_rows for size in plan.classes)


def test_memory_counts_every_buffer() -> None:
    config = ModelConfig(
        hidden_size=200, intermediate_size=300, num_layers=2, num_heads=5, num_kv_heads=1, head_dim=36, vocab_size=333
    )
    plan = Plan(config, 132, 100)
    rows = 128
    halves = rows * (256 + 320 + 5 * 64 + 5 * 48)
    singles = rows * (200 + 4) + plan.parts + plan.arrivals
    assert plan.bytes == 2 * halves + 4 * singles


@pytest.mark.parametrize("body", ["fp8", "int4", "q8_0", "q4_1"])
@pytest.mark.parametrize("name", DENSE)
def test_quantised_weights_have_two_buffers_a_kind(name: str, body: str) -> None:
    plan, plain = (Plan(PRESETS[name], 132, 4096, formats) for formats in (Formats(body, body), Formats("plain", body)))
    assert plan.possible and plan.widened and not plain.widened
    assert tuple(plan.buffers) == KINDS and not plain.buffers
    for kind in KINDS:
        matrix, widening = plan.tape.matrix(kind), plan.widening(kind)
        assert widening.format.name == body and widening.blocks * BLOCK_ROWS == matrix.rows
        assert 0 <= widening.tiles * STEP - matrix.columns < STEP
        assert 0 <= widening.pages * widening.format.columns - matrix.columns < widening.format.columns
        assert matrix.rows * widening.tiles * STEP == plan.buffers[kind]
    assert plan.bytes == plain.bytes + 2 * BUFFERS * sum(plan.buffers.values())


@pytest.mark.parametrize("name", MIXTURES)
def test_quantised_experts_share_a_buffer(name: str) -> None:
    """As large as the larger kind of matrices of all of a layer's experts; the router is never widened."""
    plan, plain = (Plan(PRESETS[name], 132, 4096, formats) for formats in (Formats("fp8", "fp8"), Formats("plain", "fp8")))
    assert plan.possible and plain.possible and tuple(plan.buffers) == ("qkv", "o")
    sizes = [plan.tape.matrix(kind).rows * plan.tape.matrix(kind).columns for kind in EXPERT_KINDS]
    experts, [held] = PRESETS[name].num_experts, plan.tensors["widened"][1]
    assert max(sizes) * experts <= held < 1.1 * max(sizes) * experts
    assert plan.bytes == plain.bytes + 2 * held + 2 * BUFFERS * sum(plan.buffers.values())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_room_for_every_slot_s_row(name: str) -> None:
    plan, config = Plan(PRESETS[name], 132, 4096), PRESETS[name]
    shapes = {what: shape for what, (_, shape) in plan.tensors.items()}
    slots = CHUNK * config.experts_per_token
    for what, columns in (("rows", config.hidden_size), ("units", config.intermediate_size), ("outputs", config.hidden_size)):
        assert shapes[what][0] == slots and shapes[what][1] % STEP == 0 and 0 <= shapes[what][1] - columns < STEP
    assert shapes["counts"][0] * ROUTED >= CHUNK
    rows = plan.tape.matrix("expert_down").rows
    assert rows <= shapes["outputs"][1] and plan.tape.matrix("expert_gate_up").rows // 2 <= shapes["units"][1]
    halves = sum(shapes[what][0] * shapes[what][1] for what in ("normed", "queries", "mixed", "rows", "units", "outputs"))
    assert 2 * halves < plan.bytes < 2 * halves + 300e6


def test_heads_that_are_normed_together_need_no_whole_tiles() -> None:
    plan = Plan(replace(PRESETS["olmoe-1b-7b"], head_dim=80), 132, 4096)
    assert plan.possible and plan.tensors["products"][1] == (CHUNK, plan.tape.matrix("qkv").rows)
    assert plan.tiling("qkv", plan.cut(64, "qkv")).kind == "single"
    assert "products" not in Plan(PRESETS["qwen3-30b-a3b"], 132, 4096).tensors


def test_more_tokens_take_larger_tiles_and_few_are_split() -> None:
    assert choose_cut("o", 4096, 2048, 2048, 132) == Cut(128, 256, 1)
    assert choose_cut("down", 32, 2048, 8192, 132).split > 1
    assert choose_cut("qkv", 32, 6144, 4096, 132, least=128).tile >= 128
