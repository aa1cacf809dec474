"""Twins of weight formats: each has the functions that the kernel calls, and numbers that are those of the host's format."""

from __future__ import annotations

import importlib

import pytest
from triton.experimental.gluon.language import constexpr

from megakernel.device.formats import COLUMN_FUNCTIONS, FUNCTIONS, MODULES, fp8, int4, q4_0, q4_1, q8_0, twin_of
from megakernel.device.formats.layouts import WORDS, fragments
from megakernel.options import Sizes
from models.formats import FORMATS, Packed
from models.formats.base import ROW_WORDS
from models.formats.blocks import TILE_GROUPS, Blocks
from models.formats.fp8 import Fp8
from models.tape import BLOCK_ROWS, PAGE_BYTES
from tests.support.compile_cases import MODELS, geometry_of

KERNEL = [name for name in FORMATS if name != "fp32"]  # the CPU machine alone has it


def test_every_format_has_a_twin() -> None:
    assert list(MODULES) == KERNEL
    for name in KERNEL:
        doc = importlib.import_module(MODULES[name].__name__).__doc__ or ""
        assert f"`models.formats.{MODULES[name].__name__.rpartition('.')[2]}`" in doc


@pytest.mark.parametrize("name", KERNEL)
def test_a_twin_s_numbers(name: str) -> None:
    format, twin = FORMATS[name], twin_of(FORMATS[name])
    assert all(callable(getattr(twin, function)) for function in FUNCTIONS + COLUMN_FUNCTIONS * format.several)
    assert twin.COLUMNS.value == format.columns
    assert twin.BESIDE.value == 4 * format.scale_words
    assert format.columns % twin.TILES.value == 0
    if isinstance(format, Packed):
        module = MODULES[name]
        assert module.TILES.value * module.TILE.value == format.columns
        assert module.TILE_WORDS.value * module.CODES.value == module.TILE.value
        assert module.TILES.value * module.TILE_WORDS.value == ROW_WORDS
        if isinstance(format, Blocks):
            assert module.TILE.value == format.group * TILE_GROUPS
        else:
            assert isinstance(format, Fp8) or module.TILE.value == format.group


@pytest.mark.parametrize("module", [fp8, int4, q8_0, q4_0, q4_1], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_layout_of_a_page_is_the_packing_s(module: object) -> None:
    """By the layout's own bases: which word lies where, once the swizzle of TMA is undone."""
    tiles, count = module.TILES.value, module.TILE_WORDS.value  # type: ignore[attr-defined]
    bases = fragments(tiles, count).offset_bases
    assert len(bases) == (PAGE_BYTES // 4 - 1).bit_length()
    found = set()
    for place in range(PAGE_BYTES // 4):
        tile = row = word = 0
        swizzled = place ^ (place >> 5 & 7) << 2  # where TMA puts the word, in units of 4 bytes
        for bit, (a, b, c) in enumerate(bases):
            if swizzled >> bit & 1:
                tile, row, word = tile ^ a, row ^ b, word ^ c
        lane, within = place % 128 // 4, place % 4
        k = place // 128 * 8 + lane % 4 * WORDS.value + within % 2
        assert (tile * count + word, row) == (k, lane // 4 + within // 2 * (BLOCK_ROWS // 2))
        found.add((tile, row, word))
    assert len(found) == PAGE_BYTES // 4


def test_a_twin_s_source_is_known_to_the_cache() -> None:
    """Triton goes by what constants say of themselves."""
    sizes = Sizes(geometry_of(MODELS["bundled"], 4))
    assert isinstance(sizes.qkv, constexpr)  # type: ignore[attr-defined]
    assert all(function.cache_key in repr(sizes) for function in twin_of(FORMATS["bf16"]).functions.values())
