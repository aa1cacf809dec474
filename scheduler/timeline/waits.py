"""Which signal ended each wait: the last producer of the counter that was full last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instructions.codec import NONE
from scheduler.timeline.trace import Point, Trace

NEVER = np.iinfo(np.int64).min  # a wait for a token before the trace


@dataclass(frozen=True, eq=False)
class Bindings:
    """Of each record in each token, int64 [tokens, records]: the counter that was full last (NONE: it waits for nothing
    that the trace holds), when its last signal was sent, by which record, and how many tokens back."""

    counter: np.ndarray
    time: np.ndarray
    producer: np.ndarray
    lag: np.ndarray


def last_signals(trace: Trace, token: int) -> tuple[np.ndarray, np.ndarray]:
    """When each counter got its last signal in a token, and from which record, int64 [counters] each."""
    records, places = np.nonzero(trace.signals != NONE)
    counters = trace.signals[records, places]
    times = trace.at(Point.SIGNALLED)[token, records]
    order = np.argsort(times, kind="stable")
    last, by = np.full(trace.program.counters, NEVER), np.full(trace.program.counters, NONE, dtype=np.int64)
    last[counters[order]], by[counters[order]] = times[order], records[order]  # of equals, assignment keeps the last
    return last, by


def bindings(trace: Trace) -> Bindings:
    """What ended every wait of a trace."""
    counters, lags = trace.waits
    shape = (trace.tokens, len(counters))
    counter, producer = np.full(shape, NONE, dtype=np.int64), np.full(shape, NONE, dtype=np.int64)
    time, lag = np.full(shape, NEVER), np.zeros(shape, dtype=np.int64)
    signals = [last_signals(trace, token) for token in range(trace.tokens)]
    for token in range(trace.tokens):
        for j in range(counters.shape[1]):
            for back in (0, 1):
                if token < back:
                    continue
                rows = np.flatnonzero((counters[:, j] != NONE) & (lags[:, j] == back))
                last, by = signals[token - back]
                found = counters[rows, j]
                later = last[found] > time[token, rows]
                rows, found = rows[later], found[later]
                counter[token, rows], time[token, rows] = found, last[found]
                producer[token, rows], lag[token, rows] = by[found], back
    return Bindings(counter, time, producer, lag)


def dependency(trace: Trace, reader: int, producer: int, lag: int) -> str:
    """A dependency in words: "down waits for gate_up"."""
    text = f"{trace.mnemonics[reader]} waits for {trace.mnemonics[producer]}"
    return f"{text} (token before)" if lag else text


def disagreement(trace: Trace, found: Bindings) -> int:
    """By how many nanoseconds a wait seems to end before the signal that ended it: what clocks or stamps are off by."""
    waited = found.counter != NONE
    early = found.time[waited] - trace.at(Point.READY)[waited]
    return max(int(early.max(initial=0)), 0)
