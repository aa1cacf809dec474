"""Where the time goes: every nanosecond of every SM in a step, in one of a few drawers.

A step runs from the end of one token (its sample is signalled) to the end of the next.  The drawers of an SM add up to the
step exactly.  What an SM does after its last signal of the step before belongs to the step in which it happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from instructions.codec import NONE
from scheduler.timeline.pages import filled_pages
from scheduler.timeline.trace import Point, Trace
from scheduler.timeline.waits import Bindings, bindings, dependency

DRAWERS = {
    "start": "start of the token, stop flag",
    "between": "between instructions",
    "counter": "waiting for a counter",
    "staging": "reading activations",
    "page": "waiting for HBM (a page)",
    "computing": "computing",
    "storing": "storing rows",
    "signalling": "signalling (fence)",
    "idle": "idle at the end",
}
FASTEST = 5  # per cent of the instructions of a kind, from which the pace of computing is taken where it must be estimated


@dataclass(frozen=True, eq=False)
class DependencyWait:
    """All waits of one kind in a token: how many, how many of them found their counter not full yet, the time spent in all
    (nanoseconds, all SMs together), and from the last signal to the end of the wait (nanoseconds, median of those)."""

    name: str
    count: float
    waited: float
    time: float
    hop: float


@dataclass(frozen=True, eq=False)
class Account:
    """The mean step of some tokens: `drawers` int64 [sms] nanoseconds, summed over the tokens, by name as in DRAWERS."""

    tokens: tuple[int, ...]
    step: float
    drawers: dict[str, np.ndarray]
    dependencies: tuple[DependencyWait, ...]

    @property
    def sms(self) -> int:
        """Number of SMs."""
        return len(self.drawers["computing"])

    def share(self, name: str) -> float:
        """Part of all SM time."""
        return float(self.drawers[name].sum()) / (self.step * self.sms * len(self.tokens))

    def mean(self, name: str) -> float:
        """Nanoseconds a step, mean of the SMs."""
        return self.share(name) * self.step


def page_waits(trace: Trace) -> np.ndarray:
    """How long consumers waited for pages after the first, int64 [tokens, records]; estimated where it was not stamped."""
    computing = trace.at(Point.COMPUTED) - trace.at(Point.LANDED)
    if Point.PAGE_WAITED in trace.given:
        first = trace.at(Point.LANDED) - trace.at(Point.STAGED)
        return np.clip(trace.at(Point.PAGE_WAITED) - first, 0, computing)
    pages = np.array([filled_pages(trace, trace.position(token)) for token in range(trace.tokens)])
    cached = np.array([bool(item.instruction.loads(trace.program.shape)) for item in trace.items])
    waits = np.zeros_like(computing)
    for kinds in (cached, ~cached):  # a page of K or V is other work than a page of weights
        streams = kinds & (pages > 0)
        if streams.any():
            pace = fastest_pace(trace, computing, pages, streams)
            waits[streams] = np.maximum(computing[streams] - pace * pages[streams], 0)
    return waits


def fastest_pace(trace: Trace, computing: np.ndarray, pages: np.ndarray, streams: np.ndarray) -> float:
    """Nanoseconds a page takes when it is there already: of the kind that is fastest, as fast as its fastest few."""
    paces = []
    for mnemonic in np.unique(trace.mnemonics[streams.any(axis=0)]):
        of_kind = streams & (trace.mnemonics == mnemonic)
        paces.append(float(np.percentile(computing[of_kind] / pages[of_kind], FASTEST)))
    return min(paces)


def spans(trace: Trace) -> Iterator[tuple[str, np.ndarray]]:
    """The time each instruction adds to each drawer, int64 [tokens, records]; what lies between them aside."""
    pages = page_waits(trace)
    at = {point: trace.at(point) for point in Point}
    waits = (trace.waits[0] != NONE).any(axis=1)
    before = at[Point.READY] - at[Point.FETCHED]
    yield "counter", before * waits
    yield "staging", at[Point.STAGED] - at[Point.READY] + before * ~waits
    yield "page", at[Point.LANDED] - at[Point.STAGED] + pages
    yield "computing", at[Point.COMPUTED] - at[Point.LANDED] - pages
    yield "storing", at[Point.STORED] - at[Point.COMPUTED]
    yield "signalling", at[Point.SIGNALLED] - at[Point.STORED]


def gaps(trace: Trace, token: int) -> dict[str, np.ndarray]:
    """Per SM, int64 [sms]: before its first instruction, between instructions, and after its last."""
    program, sms = trace.program, trace.program.sms
    begin, end = trace.begin(token), trace.end(token)
    fetched, signalled = trace.at(Point.FETCHED)[token], trace.at(Point.SIGNALLED)[token]
    found = {name: np.zeros(sms, dtype=np.int64) for name in ("start", "between", "idle")}
    busy = np.diff(program.starts) > 0
    first, last = program.starts[:-1][busy], program.starts[1:][busy] - 1
    found["start"][busy] = fetched[first] - begin
    found["idle"][busy] = end - signalled[last]
    found["idle"][~busy] = end - begin
    follows = trace.index > 0
    between = fetched[follows] - signalled[np.flatnonzero(follows) - 1]
    np.add.at(found["between"], trace.sm[follows], between)
    return found


def dependency_waits(trace: Trace, found: Bindings, tokens: Sequence[int]) -> tuple[DependencyWait, ...]:
    """The waits of some tokens by kind, the dearest first."""
    rows: dict[str, list[tuple[int, int]]] = {}
    names: dict[tuple[str, str, int], str] = {}
    fetched, ready = trace.at(Point.FETCHED), trace.at(Point.READY)
    for token in tokens:
        for i in np.flatnonzero(found.counter[token] != NONE).tolist():
            producer, lag = int(found.producer[token, i]), int(found.lag[token, i])
            key = (trace.mnemonics[i], trace.mnemonics[producer], lag)
            name = names.setdefault(key, dependency(trace, i, producer, lag))
            came = int(fetched[token, i])
            end, signal = int(ready[token, i]), int(found.time[token, i])
            rows.setdefault(name, []).append((end - came, end - signal if signal > came else -1))
    result = []
    for name, waits in rows.items():
        hops = [hop for _, hop in waits if hop >= 0]
        count, waited, time = (number / len(tokens) for number in (len(waits), len(hops), sum(total for total, _ in waits)))
        result.append(DependencyWait(name, count, waited, time, float(np.median(hops)) if hops else 0.0))
    return tuple(sorted(result, key=lambda row: -row.time))


def account(trace: Trace, tokens: Sequence[int] | None = None, found: Bindings | None = None) -> Account:
    """Split the SM time of some tokens, by default the steady ones."""
    tokens = tuple(trace.steady if tokens is None else tokens)
    drawers = {name: np.zeros(trace.program.sms, dtype=np.int64) for name in DRAWERS}
    for name, span in spans(trace):
        for token in tokens:
            np.add.at(drawers[name], trace.sm, span[token])
    for token in tokens:
        for name, gap in gaps(trace, token).items():
            drawers[name] += gap
    step = sum(trace.step(token) for token in tokens) / len(tokens)
    return Account(tokens, step, drawers, dependency_waits(trace, found or bindings(trace), tokens))
