"""The Chrome trace: valid events, lanes in which slices nest, arrows that hang on slices, counters that return to zero."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from scheduler.timeline import Point, Trace
from scheduler.timeline.chrome import FIRST_SM, GPU, chrome_events, write_chrome
from scheduler.timeline.events import INSTRUCTION, LOAD, PHASES, events
from scheduler.timeline.waits import bindings
from tests.support.timeline_cases import measured, random_stamps, small_program, small_trace

CASES = [("head64_llama3", 6), ("mha", 40)]
NANO = 1.1e-3  # microseconds: times in the file are rounded to a nanosecond


def written(name: str, sms: int) -> list[dict[str, Any]]:
    return list(chrome_events(small_trace(name, sms)))


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_the_file_is_json_with_a_lane_for_each_sm_and_role(tmp_path: Path, name: str, sms: int) -> None:
    write_chrome(tmp_path / "trace.json", small_trace(name, sms))
    content = json.loads((tmp_path / "trace.json").read_text())
    lanes = {(event["pid"], event["args"]["name"]) for event in content["traceEvents"] if event["name"] == "thread_name"}
    assert lanes == {(FIRST_SM + sm, role) for sm in range(sms) for role in ("consumer", "loader")}
    threads = [event["tid"] for event in content["traceEvents"] if event["name"] == "thread_name"]
    assert len(set(threads)) == 2 * sms, "Perfetto takes two threads of one number for one"
    assert content["otherData"]["source"] == "simulated"
    for event in content["traceEvents"]:
        assert event["ph"] in "MXCsf" and (event["ph"] == "M" or event["ts"] >= 0)


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_slices_nest_and_hold_every_instruction(name: str, sms: int) -> None:
    trace = small_trace(name, sms)
    lanes = collections.defaultdict(list)
    for event in written(name, sms):
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append(event)
    for slices in lanes.values():
        open_until: list[float] = []
        for event in slices:  # in file order: an instruction before its phases
            while open_until and open_until[-1] <= event["ts"] + NANO:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + NANO, "a slice sticks out of the one around it"
            open_until.append(end)
    whole = [event for slices in lanes.values() for event in slices if "words" in event.get("args", {})]
    assert len(whole) == len(trace.items) * len(trace.steady)


def test_phases_fill_their_instruction() -> None:
    """The phases of an instruction follow each other from its begin to its end; loads come beside them."""
    program = small_program()
    trace = measured(program, random_stamps(program, 21))
    at: dict[tuple[int, int], int] = {}
    kinds: collections.Counter[str] = collections.Counter()
    for event in events(trace, [0, 1]):
        kinds[event.kind] += 1
        key = (event.token, event.record)
        if event.kind == INSTRUCTION:
            at[key] = event.start
            assert event.end == trace.stamps[event.token, event.record, Point.SIGNALLED]
        elif event.kind != LOAD:
            assert event.start == at[key], "a gap between two phases"
            at[key] = event.end
            assert event.waited <= event.end - event.start
    assert kinds[INSTRUCTION] == 2 * len(trace.items)
    assert set(kinds) == {INSTRUCTION, LOAD, *(kind for kind, _, _ in PHASES)}
    assert all(end == trace.stamps[token, i, Point.SIGNALLED] for (token, i), end in at.items())


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_an_arrow_for_every_wait(name: str, sms: int) -> None:
    """It starts within the producer's signal, ends within the reader's instruction, and never goes back in time."""
    trace, found = small_trace(name, sms), bindings(small_trace(name, sms))
    all_events = written(name, sms)
    slices = collections.defaultdict(list)
    for event in all_events:
        if event["ph"] == "X":
            slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    starts = {event["id"]: event for event in all_events if event["ph"] == "s"}
    ends = {event["id"]: event for event in all_events if event["ph"] == "f"}
    tokens = trace.steady
    expected = sum(
        int(found.producer[token, i] >= 0 and token - found.lag[token, i] in tokens)
        for token in tokens
        for i in range(len(trace.items))
    )
    assert len(starts) == len(ends) == expected > 0
    for number, start in starts.items():
        end = ends[number]
        assert start["ts"] <= end["ts"] and start["name"] == end["name"] and end["bp"] == "e"
        assert any(a - NANO <= start["ts"] <= b + NANO and what == "signal" for a, b, what in slices[start["tid"]])
        assert any(a - NANO <= end["ts"] <= b + NANO for a, b, _ in slices[end["tid"]])


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_what_is_counted_returns_to_zero(name: str, sms: int) -> None:
    tracks = collections.defaultdict(list)
    for event in written(name, sms):
        if event["ph"] == "C":
            assert event["pid"] == GPU
            tracks[event["name"]].append((event["ts"], event["args"]["value"]))
    assert set(tracks) == {"counters in flight", "SMs waiting for a counter", "HBM GB/s"}
    for track in ("counters in flight", "SMs waiting for a counter"):
        values = [value for _, value in tracks[track]]
        assert values[-1] == 0 and min(values) == 0
    assert 0 < max(value for _, value in tracks["SMs waiting for a counter"]) <= sms
    for time, value in tracks["counters in flight"]:
        assert value == in_flight(small_trace(name, sms), round(time * 1e3))


def in_flight(trace: Trace, time: int) -> int:
    """Counters that have some of a token's signals at a time, but not all."""
    found = 0
    for token in trace.steady:
        sent = collections.defaultdict(list)
        for i, item in enumerate(trace.items):
            for counter in item.signals:
                sent[counter].append(trace.stamps[token, i, Point.SIGNALLED] <= time)
        found += sum(any(signals) and not all(signals) for signals in sent.values())
    return found
