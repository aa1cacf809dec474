"""A kernel's stamps as a trace: simulated steps, stamped by clocks that differ."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from instructions.codec import NONE, Word
from models.families import PRESETS
from scheduler.build import make_shape, schedule
from scheduler.timeline import Point, Trace, measured_trace, simulated_trace
from scheduler.timeline.measured import aligned, sightings
from scheduler.timeline.trace import TIMES
from scheduler.timeline.waits import bindings, disagreement
from tests.support.timeline_cases import ORIGIN

SMS = 24
PAST = 96
WORST = 1500.0  # nanoseconds that a clock is early or late


@functools.cache
def steps() -> Trace:
    config = dataclasses.replace(PRESETS["llama-3.2-1b"], num_layers=6)
    program = schedule(make_shape(config, sms=SMS, capacity=256, bucket=128), SMS, "balanced", None)
    return simulated_trace(program, PAST)


def stamped(trace: Trace) -> np.ndarray:
    """What a kernel would have stamped: 0 where nothing is, no PAGE_WAITED, times from anywhere on."""
    stamps = trace.stamps.copy()
    for point in TIMES:
        stamps[:, :, point] = np.where(stamps[:, :, point] >= 0, stamps[:, :, point] + ORIGIN, 0)
    return stamps[:, :, : Point.PAGE_WAITED]


def clocks(trace: Trace, seed: int = 0) -> np.ndarray:
    """The error of each SM's clock at each of the trace's stamps, nanoseconds: it wanders within a step."""
    rng = np.random.default_rng(seed)
    phase, depth = rng.uniform(0, 2 * np.pi, trace.program.sms), rng.uniform(0.3, 1.0, trace.program.sms) * WORST
    period = trace.step(1)
    when = trace.stamps[:, :, : Point.PAGE_WAITED] / period * 2 * np.pi
    return np.rint(depth[trace.sm][:, None] * np.sin(when + phase[trace.sm][:, None])).astype(np.int64)


def wrong(trace: Trace) -> np.ndarray:
    """Its stamps by such clocks."""
    stamps, error = stamped(trace), clocks(trace)
    for point in TIMES:
        if point < stamps.shape[2]:
            stamps[:, :, point] += np.where(stamps[:, :, point] > 0, error[:, :, point], 0)
    return stamps


def ready(stamps: np.ndarray) -> np.ndarray:
    return stamps[:, :, Point.READY].astype(np.float64)


def test_right_clocks_stay_right() -> None:
    stamps = stamped(steps())
    change = ready(aligned(steps().program, stamps)) - ready(stamps)
    assert np.abs(change).max() < 100


def apart(error: np.ndarray) -> np.ndarray:
    """How far the clocks of the SMs that run one kind of instruction of one layer are from their median, nanoseconds."""
    layers, mnemonics = steps().program.words[:, Word.LAYER], steps().mnemonics
    found = []
    for kind in ("qkv", "gate_up", "down"):
        for layer in range(int(layers.max()) + 1):
            group = error[1:, (mnemonics == kind) & (layers == layer)]  # of steady tokens
            found.append(group - np.median(group, axis=1, keepdims=True))
    return np.abs(np.concatenate([group.ravel() for group in found]))


def test_wrong_clocks_are_found_out() -> None:
    right, off = stamped(steps()), wrong(steps())
    before = apart(ready(off) - ready(right))
    after = apart(ready(aligned(steps().program, off)) - ready(right))
    assert before.max() > WORST
    assert after.mean() < 0.15 * before.mean()
    assert np.percentile(after, 90) < 0.2 * WORST


def test_who_did_not_wait_says_nothing_of_its_clock() -> None:
    stamps = stamped(steps())
    stamps[:, :, Point.FETCHED] = stamps[:, :, Point.READY]
    assert sightings(steps().program, stamps) == {}
    assert (aligned(steps().program, stamps) == stamps).all()


def test_a_wait_ends_when_it_could_and_not_when_looking_began() -> None:
    """Those who look early wait as long for their values as others for the counter."""
    program, stamps = steps().program, stamped(steps())
    hints = program.hints.any(axis=1)
    assert hints.any() and not hints.all()
    early = stamps.copy()
    early[:, hints, Point.READY] = early[:, hints, Point.FETCHED]
    found = measured_trace(program, early, past=PAST, machine="test")
    whole = measured_trace(program, stamps, past=PAST, machine="test")
    told = bindings(found)
    waited = (told.counter != NONE) & hints
    came = found.at(Point.FETCHED)
    staged = found.at(Point.STAGED)
    expected = np.clip(told.time, came, staged)
    assert (found.at(Point.READY)[waited] == expected[waited]).all()
    assert (found.at(Point.READY)[:, ~hints] == whole.at(Point.READY)[:, ~hints]).all()
    assert disagreement(found, told) == 0


def test_a_program_without_hints_is_taken_as_it_is() -> None:
    program = steps().program
    words = program.words.copy()
    words[:, Word.RELEASE] = 1
    releasing = dataclasses.replace(program, words=words)
    assert not releasing.hints.any()
    stamps = stamped(steps())
    found = measured_trace(releasing, stamps, past=PAST, machine="test")
    origin = stamps[:, :, TIMES[:-1]][stamps[:, :, TIMES[:-1]] > 0].min()
    assert np.abs(found.at(Point.READY) - (stamps[:, :, Point.READY] - origin)).max() < 200
