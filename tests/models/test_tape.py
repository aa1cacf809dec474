"""The map of the tape: what it must hold for any configuration, and what it holds for a few, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelConfig
from models.errors import UserError
from models.families import FAMILIES, PRESETS
from models.formats import chosen_formats
from models.tape import (
    BLOCK_ROWS,
    CONSTANT_ALIGNMENT,
    PAGE_BYTES,
    TILE_BYTES,
    TILES_PER_PAGE,
    TapeLayout,
    attention_columns,
    gate_up_rows,
    paired_head_rows,
    qkv_rows,
)
from models.weights import EMBEDDING, expected_tensors


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 4))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    experts = draw(st.integers(1, 5)) if FAMILIES[family].layer.experts else 0
    return ModelConfig(
        hidden_size=draw(st.integers(1, 700)),
        intermediate_size=draw(st.integers(1, 700)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 70)),
        vocab_size=draw(st.integers(1, 200)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        family=family,
        num_experts=experts,
        experts_per_token=min(experts, 2),
    )


@settings(max_examples=100, deadline=None)
@given(config=configs(), itemsize=st.sampled_from([2, 4]))
def test_any_layout_is_whole(config: ModelConfig, itemsize: int) -> None:
    layout = TapeLayout.from_config(config, itemsize)
    shapes = expected_tensors(config)
    next_page = 0
    named: list[str] = []
    for matrix in layout.matrices:
        assert matrix.first_page == next_page  # contiguous, so no page belongs to two
        next_page += matrix.blocks * matrix.pages_per_block
        assert matrix.row_map.shape == (matrix.blocks * BLOCK_ROWS,)
        rows = np.sort(matrix.row_map[matrix.row_map >= 0])
        assert np.array_equal(rows, np.arange(sum(matrix.source_rows)))  # every source row exactly once
        assert (matrix.row_map[matrix.row_map < 0] == -1).all()
        assert [(shapes[name][0], shapes[name][1]) for name in matrix.sources] == [
            (count, shapes[matrix.sources[0]][1]) for count in matrix.source_rows
        ]
        columns = shapes[matrix.sources[0]][1]
        if matrix.column_map is None:
            assert matrix.columns == columns
        else:
            assert matrix.column_map.shape == (matrix.columns,)
            assert np.array_equal(matrix.column_map[matrix.column_map >= 0], np.arange(columns))
        assert 0 <= matrix.pages_per_block * layout.page_columns - matrix.columns < layout.page_columns
        named += [*matrix.sources, *matrix.bias_sources, *matrix.head_norm_sources]
    assert layout.pages == next_page
    norms = [layout.norm_source(kind, layer) for kind, layer in layout.norms()]
    assert sorted([*named, *norms]) == sorted(shapes)  # every tensor has exactly one place


@settings(max_examples=100, deadline=None)
@given(config=configs())
def test_constants_do_not_overlap(config: ModelConfig) -> None:
    layout = TapeLayout.from_config(config, 2)
    starts = [(layout.norm_offset(kind, layer), config.hidden_size) for kind, layer in layout.norms()]
    starts += [(matrix.bias_offset, matrix.rows) for matrix in layout.matrices if matrix.bias_sources]
    norms = [matrix for matrix in layout.matrices if matrix.head_norm_sources]
    starts += [(matrix.head_norm_offset, 2 * config.padded_head_dim) for matrix in norms]
    end = 0
    for start, length in sorted(starts):
        assert start >= end
        assert start % CONSTANT_ALIGNMENT == 0
        end = start + length
    assert end <= layout.constant_count
    assert all((matrix.bias_offset == -1) == (not matrix.bias_sources) for matrix in layout.matrices)
    assert all((matrix.head_norm_offset == -1) == (not matrix.head_norm_sources) for matrix in layout.matrices)


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_rope_pairs_share_a_block(config: ModelConfig) -> None:
    """Rows j and j + 8 of every query and key block are dims i and i + head_dim / 2 of the same head; values lie in
    order."""
    rows = qkv_rows(config).reshape(config.num_kv_heads, config.group + 2, -1, 2, BLOCK_ROWS // 2)
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for kv_head in range(config.num_kv_heads):
        for slot in range(config.group + 1):
            first, second = rows[kv_head, slot, :, 0].reshape(-1), rows[kv_head, slot, :, 1].reshape(-1)
            is_key = slot == config.group
            head = query_rows + kv_head * config.head_dim if is_key else (kv_head * config.group + slot) * config.head_dim
            half = config.head_dim // 2
            assert np.array_equal(first[:half], head + np.arange(half))
            assert np.array_equal(second[:half], head + half + np.arange(half))
            assert (first[half:] == -1).all() and (second[half:] == -1).all()
        value = rows[kv_head, -1].reshape(-1)
        start = query_rows + kv_rows + kv_head * config.head_dim
        assert np.array_equal(value[: config.head_dim], start + np.arange(config.head_dim))
        assert (value[config.head_dim :] == -1).all()


def test_a_head_of_24_by_hand() -> None:
    """Half of 24 is 12: the second block has four pairs and four empty ones."""
    pad = [-1] * 4
    first_block = [*range(0, 8), *range(12, 20)]
    second_block = [*range(8, 12), *pad, *range(20, 24), *pad]
    assert paired_head_rows(24).tolist() == first_block + second_block


def test_gate_and_up_by_hand() -> None:
    assert gate_up_rows(10).tolist() == [*range(0, 8), *range(10, 18), 8, 9, *[-1] * 6, 18, 19, *[-1] * 6]


def test_attention_columns_by_hand() -> None:
    config = ModelConfig(8, 8, 1, 2, 1, 6, 8)
    columns = attention_columns(config)
    assert columns is not None
    assert columns.tolist() == [*range(0, 6), *[-1] * 10, *range(6, 12), *[-1] * 10]


def test_a_page_is_the_unit_of_copying() -> None:
    for itemsize in (2, 4):
        layout = TapeLayout.from_config(PRESETS["llama-3.2-1b"], itemsize)
        assert layout.tile_columns * itemsize == TILE_BYTES
        assert layout.page_elements * itemsize == PAGE_BYTES == TILES_PER_PAGE * BLOCK_ROWS * TILE_BYTES


PADDING = {  # bytes
    "smollm2-135m": 2 * (30 * (960 + 576 + 3072) * 448 + 49152 * 448),  # 576 columns in two pages; 1536 are three
    "granite-3.3-8b": 2 * 9 * 4096,  # a vocabulary of 49159
    "qwen3-30b-a3b": 2 * 48 * 128 * 2048 * 256,  # an expert's 768 units in two pages
    "mixtral-8x7b": 2 * 32 * 8 * 4096,  # 8 experts in a block of 16 rows
    "granite-3.1-3b-a800m": 2 * (32 * 8 + 13) * 1536,  # 40 experts, a vocabulary of 49155
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_padding_but_what_is_known(name: str) -> None:
    """Every weight byte of the published models is read once a token and hardly anything beside it."""
    config = PRESETS[name]
    layout = TapeLayout.from_config(config, 2)
    shapes = expected_tensors(config)
    matrix_bytes = 2 * sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    embedding_bytes = 0 if config.tied_embeddings else 2 * math.prod(shapes[EMBEDDING])
    assert layout.pages * PAGE_BYTES == matrix_bytes + PADDING.get(name, 0)
    assert layout.streamed_pages * PAGE_BYTES == layout.pages * PAGE_BYTES - embedding_bytes


def test_lookup() -> None:
    tied = TapeLayout.from_config(PRESETS["llama-3.2-1b"], 2)
    assert tied.matrix("embedding") is tied.matrix("head") is tied.matrices[-1]
    assert tied.streamed_pages == tied.pages
    untied = TapeLayout.from_config(PRESETS["llama-3-8b"], 2)
    assert untied.matrix("head").first_page < untied.matrix("embedding").first_page == untied.streamed_pages
    for layer in (0, 7, 31):
        for kind in ("qkv", "o", "gate_up", "down"):
            assert (untied.matrix(kind, layer).kind, untied.matrix(kind, layer).layer) == (kind, layer)
    for kind, layer in (("qkv", 32), ("qkv", -1), ("head", 1), ("v", 0)):
        with pytest.raises(KeyError):
            untied.matrix(kind, layer)
    for kind, layer in (("attention", 32), ("final", 1), ("mlp", -1), ("norm", 0)):
        with pytest.raises(KeyError):
            untied.norm_offset(kind, layer)


def test_one_byte_weights_are_refused() -> None:
    with pytest.raises(UserError, match="1 bytes are not supported: pack as bfloat16"):
        TapeLayout.from_config(PRESETS["llama-3.2-1b"], 1)


def test_padding_of_narrow_experts_is_not_read() -> None:
    """768 columns are a page and a half; 1,024 are two pages, and 768 of eight bits a page that is read whole."""
    config = PRESETS["qwen3-30b-a3b"]
    tape = TapeLayout.from_config(config, 2)
    down = tape.matrix("expert_down")
    assert tape.halved and down.pages_per_block == 2
    layers = [matrix for matrix in tape.matrices if not matrix.kind.startswith("expert_") and matrix.kind != "embedding"]
    gate_up = tape.matrix("expert_gate_up")
    of_a_token = config.num_layers * config.experts_per_token * (gate_up.bytes + down.blocks * 3 * PAGE_BYTES // 2)
    assert tape.streamed_bytes == sum(matrix.bytes for matrix in layers) + of_a_token
    assert not TapeLayout.from_config(config, 2, chosen_formats("fp8")).halved
    assert not TapeLayout.from_config(PRESETS["olmoe-1b-7b"], 2).halved
    assert not TapeLayout.from_config(PRESETS["smollm2-135m"], 2).halved
