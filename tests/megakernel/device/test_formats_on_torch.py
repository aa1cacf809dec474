"""The twins' own source, run as Python on what the packing wrote: products and numbers are those of the host's format."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakernel.geometry import STAGING_BYTES, Geometry, make_geometry
from models.config import ModelConfig
from models.formats import FORMATS, Formats, Packed
from models.packed import PackedModel, pack
from models.packing import quantised_rows
from models.tape import BLOCK_ROWS, PAGE_BYTES, Matrix
from models.weights import Weights
from scheduler.build import build_program, make_shape
from tests.support.configs import random_tensors
from tests.support.gluon.kernel import alone, package
from tests.support.gluon.language import expect, init, wait
from tests.support.gluon.memory import FLAT, Descriptor, Memory
from tests.support.gluon.tensor import Pointer, Tensor

NAMES = [name for name, format in FORMATS.items() if isinstance(format, Packed)]
# The output projection has rows of two pages of 4 bits and of three of 8, not whole, others have rows of one; the head has
# another format than the layers, so that two kinds of words lie beside pages.
CONFIG = ModelConfig(
    hidden_size=72, intermediate_size=64, num_layers=1, num_heads=38, num_kv_heads=1, head_dim=64, vocab_size=40,
    max_position=64,
)  # fmt: skip
RING = 3


def twin(name: str) -> Any:
    """A format's functions, of the device's own source."""
    return package()["megakernel.device.formats"].MODULES[name]


@cache
def packed(body: str, head: str) -> tuple[PackedModel, Geometry]:
    formats = Formats(body, head)
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(CONFIG, seed=3).items()}
    program = build_program(make_shape(CONFIG, sms=2, capacity=64, bucket=64, formats=formats), 2)
    return pack(Weights(tensors), CONFIG, torch.bfloat16, 64, formats), make_geometry(program)


def ring_of(geometry: Geometry) -> Any:
    """Shared memory, full of what nobody may read: NaN."""
    staging = (geometry.staging_pages + geometry.beside_pages) * STAGING_BYTES
    memory = Memory(torch.full((staging,), 0xFF, dtype=torch.uint8), torch.bfloat16, [staging // 1024, 512])
    pages = Memory(torch.full((RING * PAGE_BYTES,), 0xFF, dtype=torch.uint8), torch.int32, [RING, PAGE_BYTES // 4])
    full = Memory(torch.zeros(8 * RING, dtype=torch.uint8), torch.int64, [RING, 1])
    return SimpleNamespace(staging=memory, pages=pages, full=full)


def land(F: Any, geometry: Geometry, ring: Any, model: PackedModel, matrix: Matrix, page: int, slot: int) -> None:
    """Page `page` of a matrix comes into a slot, with what lies beside it, as TMA writes both."""
    words = model.weights[matrix.first_page + page].view(torch.int32)
    place = torch.arange(len(words))
    ring.pages.index(slot).bytes.view(torch.int32)[place ^ (place >> 5 & 7) << 2] = words
    line = min(256, matrix.format.scale_words)
    beside = model.constants[matrix.scale_offset :][: matrix.pages * matrix.format.scale_words].view(-1, line)
    full, count = ring.full.index(slot), matrix.format.scale_words
    init(full, 1)
    expect(full, 4 * count)
    F.copy_beside(geometry, Descriptor(beside, [count // line, line], FLAT), ring, page, slot)
    wait(full, 0)


def stage(F: Any, geometry: Geometry, ring: Any, x: torch.Tensor, matrix: Matrix, together: int) -> None:
    """A vector in parts of so many pages, as the kernel stages it."""
    size = together * matrix.format.columns
    parts = -(-len(x) // size)
    padded = torch.zeros(parts * size, dtype=torch.bfloat16)
    padded[: len(x)] = x
    layout = package()["megakernel.device.formats.layouts"].staged(F.STAGED, [size])
    for part, values in enumerate(padded.view(parts, size)):
        ring.staging.reinterpret(torch.bfloat16, [parts, size], layout).index(part).store(Tensor(values))
        F.stage_sums(geometry, ring, part, Tensor(values))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["o", "o, staged whole", "gate_up", "head"])
def test_products(name: str, kind: str) -> None:
    alone(lambda: check_products(name, kind))


def check_products(name: str, kind: str) -> None:
    body, head = (name, "q4_1") if kind != "head" else ("q4_1", name)
    model, geometry = packed(body, head)
    matrix = model.tape.matrix(kind.partition(",")[0])
    F = twin(name)
    ring = ring_of(geometry)
    x = torch.randn(matrix.columns, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole = 1 << (matrix.pages_per_block - 1).bit_length()
    stage(F, geometry, ring, x, matrix, 1 if kind == "o" else whole)
    rows = quantised_rows(matrix, model.weights, model.constants)[:, : matrix.columns].double()
    for block in (0, matrix.blocks - 1):
        acc = F.nothing()
        for page in range(matrix.pages_per_block):
            slot = page % RING
            land(F, geometry, ring, model, matrix, block * matrix.pages_per_block + page, slot)
            acc = F.product(F.take(geometry, ring, slot), F.activation(geometry, ring, page), acc)
        found = F.total(acc).data.sum(0)
        expected = rows[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] @ x.double()
        assert found.shape == (BLOCK_ROWS, 8)
        assert torch.equal(found, found[:, :1].expand(-1, 8)), "the same in all columns"
        assert (found[:, 0] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_numbers(name: str) -> None:
    """Units of prefill's kernel, each of a quarter of a page."""
    model, _ = packed(name, "q4_1")
    matrix = model.tape.matrix("o")
    F = twin(name)
    format = matrix.format
    rows = quantised_rows(matrix, model.weights, model.constants).view(matrix.blocks, BLOCK_ROWS, -1)
    columns = format.columns // 4
    for page in (0, matrix.pages_per_block - 1):
        number = 2 * matrix.pages_per_block + page
        words = model.weights[matrix.first_page + number].view(torch.int32)
        beside = Pointer(model.constants[matrix.scale_offset + number * format.scale_words :])
        for unit in range(4):
            pieces = words[unit * 1024 : (unit + 1) * 1024].view(8, 8, 4, 2, 2).permute(3, 1, 0, 2, 4)
            found = F.numbers(Tensor(pieces.reshape(BLOCK_ROWS, 64)), beside, unit * columns).data
            first = page * format.columns + unit * columns
            assert torch.equal(found, rows[2, :, first : first + columns].bfloat16())
