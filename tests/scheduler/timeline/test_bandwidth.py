"""Bandwidth over time: every byte once, where it landed, or near it when only records are stamped."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from scheduler.timeline import Point
from scheduler.timeline.pages import bandwidth, filled_pages, load_spans, spread_evenly, streamed_bytes
from tests.support.timeline_cases import small_trace

CASES = [("head64_llama3", 6), ("gqa4_llama3_tied", 3), ("mha", 40)]


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_landings_hold_every_page_once(name: str, sms: int) -> None:
    trace = small_trace(name, sms)
    assert trace.landings is not None
    pages = filled_pages(trace, trace.position(1))
    assert (trace.landings[1] > 0).sum() == pages.sum()
    expected = sum(item.instruction.cost(trace.program.shape, trace.position(1)).bytes for item in trace.items)
    assert streamed_bytes(trace, 1) == expected


def test_a_step_in_the_middle_holds_a_steps_bytes() -> None:
    """What was loaded ahead for the next token makes up for what was loaded ahead for this one, in the steady state."""
    trace = small_trace()
    band = bandwidth(trace, 1)
    assert band.how == "landings"
    assert band.bytes == pytest.approx(streamed_bytes(trace, 1), rel=0.02)


def test_rates_are_bytes_in_a_bin() -> None:
    trace = small_trace()
    band = bandwidth(trace, 1, bins=7)
    assert trace.landings is not None
    landed = trace.landings[(trace.landings >= band.edges[2]) & (trace.landings < band.edges[3])]
    assert band.rate[2] * (band.edges[3] - band.edges[2]) * 1e-9 == pytest.approx(16384 * len(landed))


@pytest.mark.parametrize("loaders", [True, False])
def test_coarser_stamps_spread_the_same_bytes(loaders: bool) -> None:
    trace = small_trace()
    given = trace.given if loaders else trace.given - {Point.LOAD_BEGUN, Point.LOAD_ENDED}
    coarse = dataclasses.replace(trace, landings=None, given=given)
    band = bandwidth(coarse, 1)
    assert band.how == ("loaders" if loaders else "consumers")
    assert band.bytes == pytest.approx(streamed_bytes(trace, 1), rel=0.1)
    amount = sum(part.sum() for _, _, part in load_spans(coarse, 1))
    assert amount == filled_pages(coarse, coarse.position(1)).sum() * 16384


def test_spreading_by_hand() -> None:
    edges = np.array([0.0, 10.0, 20.0, 30.0])
    start, stop, amount = np.array([5, 12, 25]), np.array([15, 12, 45]), np.array([100, 7, 40])
    assert spread_evenly(edges, start, stop, amount).tolist() == [50.0, 57.0, 10.0]
