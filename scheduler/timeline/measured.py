"""What a kernel stamped as a trace: the clocks of its SMs brought together, and hints taken for what they are."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from instructions.codec import MAX_WAITS, NONE, Word
from scheduler.program import Program
from scheduler.timeline.trace import TIMES, Point, Trace, from_stamps
from scheduler.timeline.waits import last_signals

WAITED = 1000  # nanoseconds: whoever has waited so long for a counter saw it full as soon as it could
SMOOTH = 5  # waits of an SM, of which the median is taken


def sightings(program: Program, stamps: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """Of each SM, when it saw counters full that at least half of the SMs had been waiting for, by its own clock, and by
    how many nanoseconds that was later than the median of those SMs by theirs."""
    sm, words = program.sm, program.words
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    single = (words[:, Word.WAITS] == 1) & (words[:, Word.LAGS] == 0)
    for token in stamps:
        ready, fetched = token[:, Point.READY], token[:, Point.FETCHED]
        waited = single & (ready - fetched >= WAITED)
        for counter in np.unique(words[waited, Word.WAIT]):
            records = np.flatnonzero(waited & (words[:, Word.WAIT] == counter))
            if len(np.unique(sm[records])) * 2 < program.sms:
                continue
            middle = int(np.median(ready[records]))
            for record in records.tolist():
                found[int(sm[record])].append((int(ready[record]), int(ready[record]) - middle))
    return found


def aligned(program: Program, stamps: np.ndarray) -> np.ndarray:
    """The same stamps [tokens, records, points] by one clock.

    The times that `megakernel.stamps` makes of an SM's cycles are off by up to 3 µs, most in the middle of a launch.  But SMs
    that wait for the same counter all see it full within the time of one look, dozens of times a token.  What one of them sees
    early or late, in the median of neighbouring waits, is its clock's error, between which it is interpolated.
    """
    result = stamps.copy()
    points = [point for point in TIMES if point < stamps.shape[2]]
    for sm, seen in sightings(program, stamps).items():
        times, late = np.array(sorted(seen), dtype=np.float64).T
        padded = np.pad(late, SMOOTH // 2, mode="edge")
        smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), axis=1)
        own = result[:, program.starts[sm] : program.starts[sm + 1]]
        taken = own[:, :, points]
        error = np.rint(np.interp(taken, times, smooth)).astype(np.int64)
        own[:, :, points] = np.where(taken > 0, taken - error, taken)
    return result


def measured_trace(program: Program, stamps: np.ndarray, *, past: int, machine: str) -> Trace:
    """The trace of stamps int64 [tokens, records, points] as a kernel took them, see `from_stamps`.

    An instruction may begin to look for its values before the last signals that tell of them.  Until those have come it
    counts as waiting: READY is when the last of them was sent, if that was before all values were in place.
    """
    trace = from_stamps(program, aligned(program, stamps), past=past, machine=machine)
    corrected = trace.stamps.copy()
    counters = np.where(program.hints, program.words[:, Word.WAIT : Word.WAIT + MAX_WAITS], NONE)
    for token in range(trace.tokens):
        last, _ = last_signals(trace, token)
        told = np.where(counters != NONE, last[counters], 0).max(axis=1)
        ready, staged = corrected[token, :, Point.READY], corrected[token, :, Point.STAGED]
        corrected[token, :, Point.READY] = np.maximum(ready, np.minimum(told, staged))
    return dataclasses.replace(trace, stamps=corrected)
