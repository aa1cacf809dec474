"""Packing moves every bit to its place: unpacking returns the tensors, and the tape multiplies as the matrices do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import models.packed
import models.packing
from models.config import ModelConfig
from models.errors import UserError
from models.packed import PackedModel, pack
from models.packing import clear_padding_rows, pack_weight, unpack
from models.random_weights import RandomWeights
from models.rope import rope_table
from models.tape import BLOCK_ROWS, TILES_PER_PAGE, Matrix, TapeLayout
from models.weights import EMBEDDING, Weights, expected_tensors
from tests.support.configs import MAX_POSITION, SMALL_CONFIGS, small_config

RAGGED = [
    "head24_odd_blocks",
    "all_biases_linear_head24",
    "ragged_sizes",
    "wide_mlp_long_k",
]  # rows and columns of padding


def integer_weights(config: ModelConfig) -> Weights:
    """Small integers: their products and sums are exact in fp32 in any order."""
    generator = torch.Generator().manual_seed(3)
    shapes = expected_tensors(config).items()
    return Weights({name: torch.randint(-8, 9, shape, generator=generator).float() for name, shape in shapes})


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gqa2", *RAGGED])
def test_unpacking_returns_the_very_bits(name: str, packed: torch.dtype, stored: torch.dtype) -> None:
    source = Weights.collect(RandomWeights(small_config(name), seed=5, dtype=stored))
    model = pack(source, small_config(name), packed)
    returned = unpack(model.tape, model.weights, model.constants)
    assert returned.keys() == source.by_name.keys()
    for tensor_name, tensor in source.by_name.items():
        # matrices are rounded to the packed type (torch's own nearest-even conversion), vectors stay exact in fp32
        expected = tensor.to(packed) if tensor.ndim == 2 else tensor.float()
        assert torch.equal(bits(returned[tensor_name]), bits(expected)), tensor_name


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_every_small_model_round_trips(name: str) -> None:
    source = Weights.collect(RandomWeights(small_config(name)))
    model = pack(source, small_config(name))
    returned = unpack(model.tape, model.weights, model.constants)
    assert all(torch.equal(returned[key], tensor.to(returned[key].dtype)) for key, tensor in source.by_name.items())


def multiply_pages(model: PackedModel, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """Packed rows of matrix times x, page by page as the machine reads them: `x` in packed columns, fp32 [columns]."""
    padded = torch.zeros(matrix.pages_per_block * model.tape.page_columns)
    padded[: matrix.columns] = x
    rows = torch.zeros(matrix.blocks, BLOCK_ROWS)
    for block in range(matrix.blocks):
        for step in range(matrix.pages_per_block):
            page = model.weights[matrix.first_page + block * matrix.pages_per_block + step]
            tiles = page.view(TILES_PER_PAGE, BLOCK_ROWS, model.tape.tile_columns)
            start = step * model.tape.page_columns
            columns = padded[start : start + model.tape.page_columns].view(TILES_PER_PAGE, model.tape.tile_columns)
            rows[block] += torch.einsum("trc,tc->r", tiles.float(), columns)
    return rows.view(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_matrix_times_vector_from_pages(name: str, dtype: torch.dtype) -> None:
    """Exact: integers below 2^24 in fp32. Row r of the tape is source row row_map[r]; a row of padding gives zero."""
    source = integer_weights(small_config(name))
    model = pack(source, small_config(name), dtype)
    for matrix in model.tape.matrices:
        weight = torch.cat([source.by_name[part] for part in matrix.sources])
        x = torch.randint(-8, 9, (weight.shape[1],), generator=torch.Generator().manual_seed(1)).float()
        packed_x = x
        if matrix.column_map is not None:
            column_map = torch.from_numpy(matrix.column_map).long()
            packed_x = torch.where(column_map >= 0, x[column_map], 7.0)  # the zeros of padding are the tape's, not x's
        result = multiply_pages(model, matrix, packed_x)
        row_map = torch.from_numpy(matrix.row_map).long()
        assert torch.equal(result, torch.where(row_map >= 0, (weight @ x)[row_map], 0.0))
        if matrix.bias_sources:
            bias = torch.cat([source.by_name[part] for part in matrix.bias_sources])
            stored = model.constants[matrix.bias_offset : matrix.bias_offset + matrix.rows]
            assert torch.equal(stored, torch.where(row_map >= 0, bias[row_map], 0.0))


def test_embedding_row_by_hand() -> None:
    """Token 21 is row 5 of block 1; its columns run through the tiles of that block's pages."""
    config = small_config("wide_mlp_long_k")
    source = integer_weights(config)
    model = pack(source, config)
    matrix = model.tape.matrix("embedding")
    assert matrix.pages_per_block == 2
    pages = model.weights[matrix.first_page + 2 : matrix.first_page + 4].view(2 * TILES_PER_PAGE, BLOCK_ROWS, 64)
    assert torch.equal(pages[:, 5].reshape(-1)[: config.hidden_size].float(), source.by_name[EMBEDDING][21])


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("all_biases_linear_head24")
    whole = pack(RandomWeights(config), config)
    monkeypatch.setattr(models.packing, "CHUNK_ELEMENTS", 3 * whole.tape.page_columns)
    assert torch.equal(pack(RandomWeights(config), config).weights, whole.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_nothing_of_the_tape_is_left_unwritten(name: str, dtype: torch.dtype) -> None:
    """Memory as it comes is not zero, and NaN times zero is NaN: every weight is written, padding included."""
    config = small_config(name)
    model = pack(RandomWeights(config), config, dtype)
    weights = torch.full_like(model.weights, torch.nan)
    clear_padding_rows(model.tape, weights)
    tensors = dict(RandomWeights(config).tensors())
    for matrix in model.tape.matrices:
        for source in matrix.sources:
            pack_weight(model.tape, matrix, source, tensors[source], weights, model.constants)
    assert not weights.isnan().any()
    assert torch.equal(weights, model.weights)


def test_the_rest_of_a_packed_model() -> None:
    config = small_config("gqa2")
    model = pack(RandomWeights(config), config, torch.float32, capacity=40)
    assert (model.capacity, model.dtype) == (40, torch.float32)
    assert model.weights.shape == (model.tape.pages, model.tape.page_elements)
    assert model.constants.dtype == torch.float32 and len(model.constants) == model.tape.constant_count
    assert torch.equal(model.rope, rope_table(config, 40))
    assert pack(RandomWeights(config), config).capacity == MAX_POSITION


class Altered:
    """A source that leaves out, repeats or adds tensors."""

    def __init__(self, config: ModelConfig, drop: str = "", repeat: str = "", **add: torch.Tensor) -> None:
        self.config, self.drop, self.repeat, self.add = config, drop, repeat, add

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in RandomWeights(self.config).tensors():
            if name != self.drop:
                yield name, self.add.pop(name, tensor)
            if name == self.repeat:
                yield name, tensor
        yield from self.add.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "model.norm.weight"}, "tensor model.norm.weight is missing"),
        ({"repeat": "model.norm.weight"}, "tensor model.norm.weight is left over"),
        ({"lm_head.weight": torch.zeros(100, 64)}, "tensor lm_head.weight is left over"),
        ({"model.norm.weight": torch.zeros(63)}, r"tensor model.norm.weight has shape \[63\]"),
    ],
    ids=["missing", "twice", "left over", "shape"],
)
def test_a_source_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    config = small_config("gqa2")
    with pytest.raises(UserError, match=message):
        pack(Altered(config, **changes), config)


@pytest.mark.parametrize("capacity", [0, -1, MAX_POSITION + 1])
def test_capacity_outside_of_the_model(capacity: int) -> None:
    config = small_config("gqa2")
    with pytest.raises(UserError, match=f"{capacity} tokens does not fit this model: choose 1 to {MAX_POSITION}"):
        pack(RandomWeights(config), config, capacity=capacity)


def test_packed_types() -> None:
    config = small_config("gqa2")
    with pytest.raises(UserError, match="cannot be packed as torch.float16: choose bfloat16 or float32"):
        pack(RandomWeights(config), config, torch.float16)


def test_fp16_to_bf16_rounds_to_nearest_even() -> None:
    """1 + 2^-8 lies midway between 1 and 1 + 2^-7 and goes to the even 1; 1 + 3 * 2^-8 goes to 1 + 2^-6."""
    config = replace(small_config("gqa2"), vocab_size=2)
    tensors = dict(RandomWeights(config, dtype=torch.float16).tensors())
    tensors[EMBEDDING][0, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8], dtype=torch.float16)
    model = pack(Weights(tensors), config)
    first = model.weights[model.tape.matrix("embedding").first_page].view(TILES_PER_PAGE, BLOCK_ROWS, 64)[0, 0, :2]
    assert np.array_equal(first.float().numpy(), np.array([1, 1 + 2**-6], np.float32))


def test_the_first_of_several_faults_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the tensors that are packed together fails first, and though the source itself ends badly."""
    config = small_config("gqa2")
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    damaged = {name: torch.full(expected_tensors(config)[name], torch.nan) for name in (first, second)}

    def pack_slowly(layout: TapeLayout, matrix: Matrix, source: str, *rest: torch.Tensor) -> None:
        if source == first:
            time.sleep(0.05)
        pack_weight(layout, matrix, source, *rest)

    monkeypatch.setattr(models.packed, "pack_weight", pack_slowly)
    for at_once in (1, 8):
        monkeypatch.setattr(models.packed, "PACKERS", at_once)
        source = Altered(config, drop="model.norm.weight")
        source.add = dict(damaged)
        with pytest.raises(UserError, match=f"tensor {first} holds nan"):
            pack(source, config)
