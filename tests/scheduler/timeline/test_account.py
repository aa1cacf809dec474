"""Every nanosecond of every SM is in one drawer, the right one; waits are blamed on whoever signalled last."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.codec import NONE
from scheduler.costs import MachineModel
from scheduler.timeline import Point, simulated_trace
from scheduler.timeline.account import DRAWERS, account, page_waits
from scheduler.timeline.trace import CONSUMER
from scheduler.timeline.waits import NEVER, bindings, disagreement
from tests.support.timeline_cases import POSITION, measured, random_stamps, small_program, small_trace, walked

CASES = [("head64_llama3", 6), ("gqa4_llama3_tied", 3), ("mha", 40)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), case=st.sampled_from(CASES), pages=st.booleans())
def test_the_drawers_add_up_to_the_step(seed: int, case: tuple[str, int], pages: bool) -> None:
    """To the nanosecond, for any stamps, with page waits stamped or estimated."""
    stamps = random_stamps(small_program(*case), seed)
    trace = measured(small_program(*case), stamps if pages else stamps[:, :, : Point.PAGE_WAITED])
    split = account(trace, [0, 1])
    together = np.sum([split.drawers[name] for name in DRAWERS], axis=0)
    if pages:
        assert (together == trace.step(0) + trace.step(1)).all()
    assert abs(sum(map(split.share, DRAWERS)) - 1) < 1e-12
    within = [name for name in DRAWERS if name not in ("start", "idle")]  # an SM of `walked` waits for no token's end
    assert all((split.drawers[name] >= 0).all() for name in within)


def test_a_known_day() -> None:
    """Every instruction takes 10, 20, ... 60 ns in its six phases, 7 of the fourth waiting for a page, and 5 before it."""
    program = small_program()
    count = np.diff(program.starts)
    spans = np.broadcast_to(np.arange(10, 61, 10), (1, len(program.words), len(CONSUMER) - 1))
    stamps = walked(program, spans, np.full((1, len(program.words)), 5))
    stamps[:, :, Point.PAGE_WAITED] = 30 + 7  # the first page takes all of the third phase
    trace = measured(program, stamps)
    split = account(trace)
    waits = np.array([sum(bool(item.waits) for item in queue) for queue in program.decoded])
    expected = {
        "counter": 10 * waits,
        "staging": 20 * count + 10 * (count - waits),
        "page": 37 * count,
        "computing": 33 * count,
        "storing": 50 * count,
        "signalling": 60 * count,
        "between": 5 * (count - 1),
    }
    for name, values in expected.items():
        assert split.drawers[name].tolist() == values.tolist(), name


def test_waits_end_with_the_last_signal() -> None:
    """Against a search through everything, on random stamps of two tokens."""
    program = small_program()
    trace = measured(program, random_stamps(program, 11))
    found = bindings(trace)
    signalled = trace.at(Point.SIGNALLED)
    for token in range(trace.tokens):
        for i, item in enumerate(trace.items):
            best = (NEVER, NONE)
            for wait in item.waits:
                if token - wait.lag >= 0:
                    producers = [j for j, other in enumerate(trace.items) if wait.counter in other.signals]
                    best = max(best, (int(max(signalled[token - wait.lag, j] for j in producers)), wait.counter))
            assert found.time[token, i] == best[0]
            if best[1] != NONE:
                producer, lag = found.producer[token, i], found.lag[token, i]
                assert signalled[token - lag, producer] == best[0]
                assert found.counter[token, i] in trace.items[producer].signals


def test_dependencies_in_words() -> None:
    """Every kind by name; from the last signal to the reader it takes what the model says: 1 us more makes 1 us more."""
    split = account(small_trace())
    rows = {row.name: row for row in split.dependencies}
    slow = simulated_trace(small_program(), POSITION, MachineModel(poll=MachineModel().poll + 1e-6))
    hops = [row.hop for row in account(slow).dependencies if row.name == "gate_up waits for o_proj"]
    assert hops == [pytest.approx(rows["gate_up waits for o_proj"].hop + 1000, abs=2)]
    layers = small_trace().program.shape.config.num_layers
    assert rows["down waits for gate_up"].count == (small_trace().mnemonics == "down").sum()
    assert rows["embed waits for sample (token before)"].count == 1
    assert rows["combine waits for attention"].count == layers * small_trace().program.shape.config.num_kv_heads
    total = sum(row.time for row in split.dependencies)
    assert total == pytest.approx(split.mean("counter") * split.sms)


def test_estimated_page_waits_are_near_the_simulated() -> None:
    """Without PAGE_WAITED the pace of the fastest stands in; where some instruction finds its pages there, that is exact."""
    trace = small_trace("gqa4_llama3_tied", 3)
    blind = dataclasses.replace(trace, given=trace.given - {Point.PAGE_WAITED})
    known, guessed = page_waits(trace)[1:].sum(), page_waits(blind)[1:].sum()
    busy = (trace.at(Point.COMPUTED) - trace.at(Point.LANDED))[1:].sum()
    assert abs(known - guessed) < 0.05 * busy
    assert any("estimated" in note for note in blind.notes) and not any("estimated" in note for note in trace.notes)


def test_clocks_that_disagree_are_reported() -> None:
    assert disagreement(small_trace(), bindings(small_trace())) == 0
    program = small_program()
    stamps = small_trace().stamps.copy() + 1
    late = np.repeat(np.arange(program.sms), np.diff(program.starts)) == 2
    times = [point for point in Point if point not in (Point.LOAD_WAITED, Point.PAGE_WAITED)]
    for point in times:
        stamps[:, late, point] += 5_000  # one SM's clock is 5 us ahead
    off = measured(program, stamps)
    assert 4_000 <= disagreement(off, bindings(off)) <= 5_000
