"""From the cycles of every SM to nanoseconds that hold for all of them."""

from __future__ import annotations

import numpy as np

from megakernel.stamps import Clock, Point, nanoseconds


def test_every_sm_has_its_own_clock() -> None:
    """Two SMs whose cycles began elsewhere and differ in length note the same moments."""
    moments = np.arange(1_000_000, 1_000_000 + 3 * 4 * len(Point)).reshape(3, 4, len(Point))
    sm = np.array([0, 0, 1, 1])
    begin, end = 999_000, 1_999_000
    offset, a_nanosecond = np.array([5_000, 77_000_000]), np.array([2, 4])  # cycles
    clocks = np.zeros((2, len(Clock)), dtype=np.int64)
    clocks[:, Clock.BEGIN_TIME], clocks[:, Clock.END_TIME] = begin, end
    clocks[:, Clock.BEGIN_CYCLE] = offset
    clocks[:, Clock.END_CYCLE] = offset + (end - begin) * a_nanosecond
    cycles = (moments - begin) * a_nanosecond[sm][:, None] + offset[sm][:, None]
    cycles[:, :, Point.LOAD_WAITED] = 120 * a_nanosecond[sm]
    cycles[1, 2, Point.LANDED] = 0  # not taken
    found = nanoseconds(cycles, clocks, sm)
    expected = moments.copy()
    expected[:, :, Point.LOAD_WAITED] = 120
    expected[1, 2, Point.LANDED] = 0
    assert (found == expected).all()


def test_nothing_noted_is_nothing() -> None:
    """A launch that left at once has neither stamps nor a second tick."""
    stamps, clocks = np.zeros((2, 3, len(Point)), np.int64), np.zeros((1, len(Clock)), np.int64)
    assert not nanoseconds(stamps, clocks, np.zeros(3, int)).any()
