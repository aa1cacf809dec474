"""The kernel's own walk, run as Python: its source with numbers and NumPy in place of Gluon finds the tiles of its mirror."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.grouped.tiling import CUTS, TILE_ROWS, Plan, Tile, tiles
from tests.support import ROOT

WALK = ROOT / "megakernel" / "device" / "grouped" / "walk.py"
COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1500), st.just(0)), min_size=1, max_size=30)
PLACES = st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 700)


@dataclass(frozen=True)
class Pointer:
    """Into an array, by elements."""

    array: Any
    index: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.array, self.index + more)


class Constant(tuple):
    """A compile-time tuple."""

    @property
    def value(self) -> tuple:
        return tuple(self)


def load(pointer: Pointer, mask: Any, other: int) -> Any:
    """Elements where the mask allows; outside the array nothing may be asked for."""
    index = np.asarray(where(mask, pointer.index, 0))
    assert (index >= 0).all() and (index < len(pointer.array)).all()
    return where(mask, pointer.array[index], other)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Of numbers, a number."""
    return np.asarray(np.where(condition, yes, no))[()]


def language(programs: int) -> SimpleNamespace:
    """What the walk uses of Gluon."""
    return SimpleNamespace(
        constexpr=lambda value: Constant(value) if isinstance(value, tuple) else value,
        tensor=object,
        load=load,
        arange=lambda start, stop, layout: np.arange(start, stop),
        BlockedLayout=lambda *parts: None,
        num_warps=lambda: 4,
        num_programs=lambda axis: programs,
        static_range=range,
        to_tensor=lambda value: value,
        minimum=np.minimum,
        maximum=np.maximum,
        where=where,
        sum=lambda values, axis: values.sum(),
        cdiv=lambda dividend, divisor: -(-dividend // divisor),
    )


def aggregate(cls: type) -> Any:
    """A record of the annotated fields."""
    return dataclass(cls)


@cache
def source() -> str:
    """The walk's file without its imports."""
    return re.sub(r"^from .*$", "", Path(WALK).read_text(), flags=re.MULTILINE)


def walked(offsets: list[int], rows: int, n: int, sms: int, band: int) -> list[Tile]:
    """All tiles by their number, each found by the SM that has it."""
    jit = SimpleNamespace(jit=lambda function: function, constexpr_function=lambda function: function)
    names: dict[str, Any] = {"gl": language(sms), "gluon": jit, "aggregate": aggregate}
    names |= {"HOST_CUTS": CUTS, "HOST_TILE_ROWS": TILE_ROWS}
    exec(source(), names)
    tiling, groups = Plan(sms).tiling(len(offsets)), len(offsets)
    work = names["plan_work"](tiling, Pointer(np.array(offsets)), groups, rows, n, tiling.step, band)
    found: dict[int, Tile] = {}
    for sm in range(min(sms, int(work.items))):
        place = names["first_place"](work)
        for index in range(sm, int(work.items), sms):
            place = names["seek"](work, place, index)
            item = names["item_at"](work, place, index)
            found[index] = Tile(int(item.group), int(item.start), int(item.count), int(item.column))
    return [found[index] for index in range(len(found))]


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, n=st.integers(1, 40), sms=st.sampled_from([1, 5, 132]), band=st.integers(1, 9), beyond=st.integers(0, 99))
def test_the_kernel_walks_as_its_mirror(counts: list[int], n: int, sms: int, band: int, beyond: int) -> None:
    offsets = list(accumulate(counts))
    problem = (offsets, offsets[-1] + beyond, 16 * n, sms, band)
    assert walked(*problem) == list(tiles(*problem))


@settings(max_examples=100, deadline=None)
@given(offsets=st.lists(PLACES, min_size=1, max_size=12), rows=st.integers(1, 700), sms=st.sampled_from([1, 7]))
def test_offsets_that_are_none_end_the_same_way(offsets: list[int], rows: int, sms: int) -> None:
    found = walked(offsets, rows, 256, sms, 8)
    assert found == list(tiles(offsets, rows, 256, sms, 8))
    assert all(tile.first >= 0 and tile.first + tile.count <= rows for tile in found), "nothing outside x"
