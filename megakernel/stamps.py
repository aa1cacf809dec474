"""The in-kernel trace as the kernel writes it: int64, first [SMs, clocks], then [tokens, records, points], in cycles."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Point(IntEnum):
    """What a record's time stamps mark; the LOAD points are the loader's, LOAD_WAITED a duration."""

    FETCHED = 0  # the consumer turned to the record
    READY = 1  # all its counters were met
    LANDED = 2  # its first page had landed
    COMPUTED = 3  # its last page was multiplied
    STORED = 4  # its rows were on their way to memory
    SIGNALLED = 5  # its signals were sent
    LOAD_BEGUN = 6  # the loader turned to the record
    LOAD_ENDED = 7  # its last copy was issued
    LOAD_WAITED = 8  # of that, time spent waiting for a page to be released
    STAGED = 9  # its activations were in place


class Clock(IntEnum):
    """What every SM notes at the beginning and at the end of a launch: a tick of the GPU's clock, its own cycles then."""

    BEGIN_TIME = 0
    BEGIN_CYCLE = 1
    END_TIME = 2
    END_CYCLE = 3


def nanoseconds(stamps: np.ndarray, clocks: np.ndarray, sm: np.ndarray) -> np.ndarray:
    """Cycles as nanoseconds of the GPU's clock, int64 [tokens, records, points]; 0, "not taken", stays 0.

    stamps int64 [tokens, records, points] in cycles, clocks int64 [SMs, clocks], sm int [records]: whose record it is.
    Each SM's cycles are taken to have one length during the launch.
    """
    begin_time, begin, end_time, end = (clocks[sm, clock].astype(np.int64) for clock in Clock)
    length = (end_time - begin_time) / np.maximum(end - begin, 1)  # nanoseconds a cycle, [records]
    found = np.rint((stamps - begin[:, None]) * length[:, None]).astype(np.int64) + begin_time[:, None]
    waited = Point.LOAD_WAITED
    found[:, :, waited] = np.rint(stamps[:, :, waited] * length)
    return np.where(stamps == 0, 0, found)
