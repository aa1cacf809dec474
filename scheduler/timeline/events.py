"""A trace as a list of events: what each SM's loader and consumer did from when to when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from scheduler.timeline.account import page_waits
from scheduler.timeline.trace import Point, Trace

CONSUMER, LOADER = "consumer", "loader"
PHASES = (
    ("wait for counters", Point.FETCHED, Point.READY),
    ("read activations", Point.READY, Point.STAGED),
    ("wait for the first page", Point.STAGED, Point.LANDED),
    ("compute", Point.LANDED, Point.COMPUTED),
    ("store", Point.COMPUTED, Point.STORED),
    ("signal", Point.STORED, Point.SIGNALLED),
)
INSTRUCTION, LOAD = "instruction", "load"


@dataclass(frozen=True)
class Event:
    """Something that took from `start` to `end` (nanoseconds).

    `kind` is "instruction" (all of it), one of PHASES, or "load" (of a loader: from turning to the record to its last
    copy).  `waited` is the part of a "compute" spent waiting for pages, of a "load" waiting for a free one.
    """

    sm: int
    role: str
    record: int
    index: int
    token: int
    kind: str
    start: int
    end: int
    waited: int = 0


def events(trace: Trace, tokens: Iterable[int] | None = None) -> Iterator[Event]:
    """All events of some tokens, an instruction before its phases; phases without length are left out."""
    waits = page_waits(trace)
    for token in trace.steady if tokens is None else tokens:
        stamps, waited = trace.stamps[token].tolist(), waits[token].tolist()
        for i, (at, sm, index) in enumerate(zip(stamps, trace.sm.tolist(), trace.index.tolist(), strict=True)):
            place = (i, index, token)
            yield Event(sm, CONSUMER, *place, INSTRUCTION, at[Point.FETCHED], at[Point.SIGNALLED])
            for kind, first, last in PHASES:
                if at[last] > at[first]:
                    yield Event(sm, CONSUMER, *place, kind, at[first], at[last], waited[i] * (kind == "compute"))
            if at[Point.LOAD_ENDED] > at[Point.LOAD_BEGUN]:
                yield Event(sm, LOADER, *place, LOAD, at[Point.LOAD_BEGUN], at[Point.LOAD_ENDED], at[Point.LOAD_WAITED])
