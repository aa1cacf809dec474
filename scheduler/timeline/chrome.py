"""A trace in the Trace Event Format (Chrome's JSON), which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

One process for each SM with a lane for its consumer and one for its loader; one process for the whole GPU with what is
counted: counters in flight, SMs that wait for one, bandwidth.  Arrows go from the last signal of a counter to the wait that
it ended.  Times in the file are microseconds.

Format: "Trace Event Format", Google, 2016: X complete events, s and f flow events, C counter events, M metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructions.codec import NONE, disassemble
from models.output import write_file
from scheduler.timeline.events import CONSUMER, INSTRUCTION, LOADER, Event, events
from scheduler.timeline.pages import bandwidth
from scheduler.timeline.trace import Point, Trace
from scheduler.timeline.waits import Bindings, bindings, dependency, last_signals

GPU = 1  # process number; SM s is process FIRST_SM + s.  Thread numbers differ between processes: Perfetto wants that
FIRST_SM = 1000
ROLES = (CONSUMER, LOADER)

JsonEvent = dict[str, Any]


def lane(sm: int, role: str) -> dict[str, int]:
    """Process and thread of a role of an SM."""
    return {"pid": FIRST_SM + sm, "tid": 10 * (FIRST_SM + sm) + ROLES.index(role)}


def micro(nanoseconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(nanoseconds / 1e3, 3)


def metadata(trace: Trace) -> Iterator[JsonEvent]:
    """Names and order of processes and lanes."""
    yield {"ph": "M", "name": "process_name", "pid": GPU, "args": {"name": "GPU"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": GPU, "args": {"sort_index": 0}}
    for sm in range(trace.program.sms):
        pid = FIRST_SM + sm
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"SM {sm}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": sm + 1}}
        for place, role in enumerate(ROLES):
            yield {"ph": "M", "name": "thread_name", **lane(sm, role), "args": {"name": role}}
            yield {"ph": "M", "name": "thread_sort_index", **lane(sm, role), "args": {"sort_index": place}}


def slice_event(trace: Trace, event: Event) -> JsonEvent:
    """One event as a slice."""
    item = trace.items[event.record]
    name = f"{item.instruction.MNEMONIC} {item.instruction.layer}"
    slice_: JsonEvent = {"ph": "X", "cat": event.role, **lane(event.sm, event.role)}
    slice_ |= {"ts": micro(event.start), "dur": micro(event.end - event.start)}
    if event.kind == INSTRUCTION:
        what = " ".join(disassemble(item).split())
        return slice_ | {"name": name, "args": {"token": event.token, "index": event.index, "words": what}}
    if event.role == LOADER:
        args = {"pages": item.pages, "waited for free pages, us": micro(event.waited)}
        return slice_ | {"name": f"load {name}", "args": args}
    return slice_ | {"name": event.kind} | ({"args": {"waited for pages, us": micro(event.waited)}} if event.waited else {})


def flows(trace: Trace, tokens: Sequence[int], found: Bindings) -> Iterator[JsonEvent]:
    """An arrow for each wait: from the signal that ended it to its end."""
    number = 0
    for token in tokens:
        for i in np.flatnonzero(found.counter[token] != NONE).tolist():
            producer, back = int(found.producer[token, i]), int(found.lag[token, i])
            if token - back not in tokens:
                continue
            number += 1
            common = {"cat": "dependency", "id": number, "name": dependency(trace, i, producer, back)}
            ready = max(int(trace.stamps[token, i, Point.READY]) - 1, int(trace.stamps[token, i, Point.FETCHED]))
            signal = int(found.time[token, i]) - 1  # within the signal's slice, to which the arrow is then tied
            yield {"ph": "s", **common, **lane(int(trace.sm[producer]), CONSUMER), "ts": micro(signal)}
            yield {"ph": "f", "bp": "e", **common, **lane(int(trace.sm[i]), CONSUMER), "ts": micro(max(ready, signal))}


def steps(name: str, starts: np.ndarray, stops: np.ndarray) -> Iterator[JsonEvent]:
    """How many of some intervals [start, stop) are open, as a counter track."""
    times, inverse = np.unique(np.concatenate((starts, stops)), return_inverse=True)
    change = np.concatenate((np.ones(len(starts), dtype=np.int64), -np.ones(len(stops), dtype=np.int64)))
    level = np.cumsum(np.bincount(inverse, weights=change)) if len(times) else times
    for time, value in zip(times.tolist(), level.tolist(), strict=True):
        yield {"ph": "C", "pid": GPU, "name": name, "ts": micro(time), "args": {"value": int(value)}}


def counter_tracks(trace: Trace, tokens: Sequence[int]) -> Iterator[JsonEvent]:
    """Counters in flight (some of a token's signals sent, not all), SMs that wait for a counter, and HBM bandwidth."""
    records, places = np.nonzero(trace.signals != NONE)
    counters = trace.signals[records, places]
    first, last = [], []
    for token in tokens:
        opened = np.full(trace.program.counters, np.iinfo(np.int64).max)
        np.minimum.at(opened, counters, trace.at(Point.SIGNALLED)[token, records])
        used = np.unique(counters)
        first.append(opened[used])
        last.append(last_signals(trace, token)[0][used])
    yield from steps("counters in flight", np.concatenate(first), np.concatenate(last))
    waits = (trace.waits[0] != NONE).any(axis=1)
    came, ready = (trace.at(point)[list(tokens)][:, waits].ravel() for point in (Point.FETCHED, Point.READY))
    yield from steps("SMs waiting for a counter", came, ready)
    for token in tokens:
        band = bandwidth(trace, token)
        for edge, rate in zip(band.edges.tolist(), band.rate.tolist(), strict=False):
            yield {"ph": "C", "pid": GPU, "name": "HBM GB/s", "ts": micro(edge), "args": {"value": round(rate / 1e9)}}


def chrome_events(trace: Trace, tokens: Sequence[int] | None = None, found: Bindings | None = None) -> Iterator[JsonEvent]:
    """All events of some tokens, by default the steady ones."""
    tokens = list(trace.steady if tokens is None else tokens)
    yield from metadata(trace)
    yield from (slice_event(trace, event) for event in events(trace, tokens))
    yield from flows(trace, tokens, found or bindings(trace))
    yield from counter_tracks(trace, tokens)


def write_chrome(path: Path, trace: Trace, tokens: Sequence[int] | None = None, found: Bindings | None = None) -> None:
    """Write the file, an event a line."""
    about = {"source": trace.source, "machine": trace.machine, "position": trace.past, "program": trace.program.policy}
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in chrome_events(trace, tokens, found))
    write_file(path, '{"displayTimeUnit":"ns","otherData":' + json.dumps(about) + f',"traceEvents":[\n{lines}\n]}}\n')
