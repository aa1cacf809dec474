"""The layout: a column for each SM, nothing on top of anything else, and every edge pointing down."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.build import build_program, make_shape
from scheduler.costs import MachineModel
from scheduler.draw.content import Drawing, make_drawing
from scheduler.draw.layout import CELL_HEIGHT, ROW, group_key, spread
from scheduler.draw.svg import Canvas
from scheduler.errors import ScheduleError
from tests.support.configs import small_config
from tests.support.drawings import small_drawing

CASES = [("head64_llama3", 6, None), ("head64_llama3", 6, 1), ("gqa4_llama3_tied", 1, None), ("mha", 40, None)]


@pytest.fixture(params=CASES, ids=str)
def drawing(request: pytest.FixtureRequest) -> Drawing:
    return small_drawing(*request.param)


def test_everything_has_its_place(drawing: Drawing) -> None:
    """All instructions, or all of the layer; a counter is drawn where someone that is drawn signals it or waits for it."""
    layout, listing = drawing.layout, drawing.listing
    one_layer = len(layout.groups) == 1
    for i, item in enumerate(listing.items):
        assert (layout.records[i] is None) == (one_layer and group_key(item.instruction) != (1, 1))
    for counter, place in enumerate(layout.counters):
        signalled = any(layout.records[i] for i in listing.producers[counter])
        waits = any(wait.counter == counter and not wait.lag for i in drawing.shown for wait in listing.items[i].waits)
        assert (place is not None) == (signalled or waits)


def test_nothing_overlaps(drawing: Drawing) -> None:
    layout = drawing.layout
    places = [place for place in layout.records if place]
    assert len(set(places)) == len(places)
    assert ROW >= CELL_HEIGHT
    for group in layout.groups:
        edges = [(band.y, band.y + band.height) for band in group.bands]
        assert all(one[1] < two[0] for one, two in itertools.pairwise(edges)) and edges[-1][1] < group.height
    counters = [place for place in layout.counters if place]
    assert len(set(counters)) == len(counters)


def test_an_sm_is_a_column(drawing: Drawing) -> None:
    layout = drawing.layout
    for i in drawing.shown:
        place = layout.records[i]
        assert place is not None and place.x == (drawing.listing.sm[i] + 0.5) * layout.pitch


def test_edges_point_down(drawing: Drawing) -> None:
    """So a reader of the picture sees time pass from top to bottom."""
    canvas = Canvas(drawing)
    checked = 0
    for i in drawing.shown:
        node, item = canvas.node(i), drawing.listing.items[i]
        assert node is not None
        for counter in item.signals:
            end = canvas.node(-1 - counter)
            assert end is not None and end[1] > node[1]
            checked += 1
        for wait in item.waits:
            start = canvas.node(-1 - wait.counter)
            if start is not None and not wait.lag:
                assert start[1] < node[1]
                checked += 1
    assert checked > 10


def test_bands_name_what_stands_in_them(drawing: Drawing) -> None:
    for number, group in enumerate(drawing.layout.groups):
        for band in group.bands:
            members = [
                i
                for i, place in enumerate(drawing.layout.records)
                if place and place.group == number and band.y < place.y < band.y + band.height
            ]
            assert {drawing.listing.items[i].instruction.MNEMONIC for i in members} == {band.mnemonic}
            assert len(members) == band.count


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=200), st.floats(10, 1000))
def test_counters_side_by_side(wanted: list[float], width: float) -> None:
    """In their order, within the width, apart from each other."""
    placed = spread(wanted, width)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert min(placed) >= 0 and max(placed) <= width
    assert all(placed[a] < placed[b] for a, b in itertools.pairwise(order))


def test_a_tail_is_drawn_like_any_program() -> None:
    """The layer that it has, which begins with the hand-over, then the head."""
    shape = make_shape(small_config("head64_llama3"), sms=6, capacity=256, bucket=256, tail=True)
    drawing = make_drawing("a tail", build_program(shape, 6), 100, MachineModel())
    assert [group.name for group in drawing.layout.groups] == ["layer 1", "head and sampling"]
    assert drawing.layout.groups[0].bands[0].mnemonic == "hand_over" and all(drawing.layout.records)
    assert drawing.seconds > 0
    with pytest.raises(ScheduleError, match="layer 0 of a program with layers 1 to 1"):
        make_drawing("a tail", drawing.program, 100, MachineModel(), layer=0)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_none(layer: int) -> None:
    with pytest.raises(ScheduleError, match=f"layer {layer} of a program with layers 0 to 1"):
        small_drawing("head64_llama3", 6, layer)
