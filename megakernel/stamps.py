"""The in-kernel trace as the kernel writes it: int64 [tokens, records, points], nanoseconds of one clock for the whole GPU."""

from __future__ import annotations

from enum import IntEnum


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
