"""How a grouped product is cut: every row of every group in one tile a column of tiles, whatever the groups and the SMs."""

from __future__ import annotations

import random
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.grouped.tiling import (
    CUTS,
    LINE,
    MAIN,
    MOST_GROUPS,
    SLOTS,
    TAIL,
    TILE_ROWS,
    WIDTHS,
    Plan,
    choose_cut,
    padded_rows,
    sizes,
    tiles,
    token_tiles,
    width,
)

COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1500), st.just(0)), min_size=1, max_size=40)
SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, n=st.integers(1, 40), sms=st.sampled_from([1, 7, 132, 10**6]), band=st.integers(1, 9))
def test_every_row_of_every_group_once(counts: list[int], n: int, sms: int, band: int) -> None:
    offsets = list(accumulate(counts))
    columns = -(-16 * n // TILE_ROWS)
    covered: Counter[tuple[int, int, int]] = Counter()
    last = -1
    for tile in tiles(offsets, offsets[-1], 16 * n, sms, band):
        assert tile.group >= last, "whoever walks goes forward only"
        last = tile.group
        assert 1 <= tile.count <= sum(width(tile.count))
        covered.update((tile.group, row, tile.column) for row in range(tile.first, tile.first + tile.count))
    wanted = {
        (group, row, column)
        for group, (start, count) in enumerate(sizes(offsets, offsets[-1]))
        for row in range(start, start + count)
        for column in range(columns)
    }
    assert covered.keys() == wanted and set(covered.values()) <= {1}


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 5000), cut=st.sampled_from(CUTS))
def test_no_tile_is_wider_than_what_is_compiled(count: int, cut: tuple[int, int]) -> None:
    whole = token_tiles(count, cut)
    assert (whole == 0) == (count == 0)
    if count:
        rest = count - (whole - 1) * cut[0]
        assert 1 <= rest <= sum(cut) <= MAIN + TAIL
        assert width(rest)[0] <= cut[0] or sum(width(rest)) <= sum(cut)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), st.integers(0, 1000))
def test_offsets_that_are_none_stay_within_x(offsets: list[int], rows: int) -> None:
    for start, count in sizes(offsets, rows):
        assert count >= 0 and start >= 0 and start + count <= rows


def test_every_sm_gets_a_tile_where_that_can_be() -> None:
    assert choose_cut([256] * 128, 12, 132) == CUTS[0]
    assert choose_cut([512], 16, 132) == CUTS[-1], "no cut fills the SMs"
    assert choose_cut([1024], 16, 132) == CUTS[-1]
    assert choose_cut([1200], 16, 132) == CUTS[1]


def test_a_band_keeps_its_weights() -> None:
    """Tiles of tokens of one band follow one another with the same weights; with a band of one, never."""
    banded = [tile.column for tile in tiles([1024], 1024, 512, 1, 4)]
    assert banded == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert [tile.column for tile in tiles([1024], 1024, 512, 1, 1)] == [0, 1, 2, 3] * 4


def test_widths_rise_and_fit_shared_memory() -> None:
    totals = [sum(each) for each in WIDTHS]
    assert totals == sorted(set(totals))
    assert {sum(cut) for cut in CUTS} <= set(totals)
    assert max(totals) == MAIN + TAIL
    assert SLOTS * (MAIN + TAIL + TILE_ROWS) * LINE < SHARED
    assert all(main % 64 == 0 or (tail == 0 and main % 16 == 0) for main, tail in WIDTHS), "boxes of 64 or of 16 tokens"


@pytest.mark.parametrize(("experts", "top", "most"), [(128, 8, 0.07), (64, 8, 0.05), (8, 2, 0.03)])
def test_waste_of_evenly_drawn_experts(experts: int, top: int, most: float) -> None:
    """4,096 tokens: rows that are multiplied beyond those that there are."""
    draw = random.Random(0)
    drawn = Counter(expert for _ in range(4096) for expert in draw.sample(range(experts), top))
    counts = [drawn[expert] for expert in range(experts)]
    assert padded_rows(counts, CUTS[0]) <= (1 + most) * 4096 * top


def test_one_kernel_for_up_to_128_groups() -> None:
    plan = Plan(132)
    assert plan.tiling(1) == plan.tiling(128) != plan.tiling(129)
    assert plan.tiling(MOST_GROUPS).groups == MOST_GROUPS


def test_a_step_is_a_line_of_either_type() -> None:
    for itemsize in (1, 2):
        tiling = Plan(132).tiling(8, itemsize)
        assert tiling.step * itemsize == LINE and tiling.scaled == (itemsize == 1)
