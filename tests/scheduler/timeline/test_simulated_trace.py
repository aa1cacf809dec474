"""The simulator's trace says what the simulation says, and its loaders obey the machine's rules."""

from __future__ import annotations

import numpy as np
import pytest

from models.tape import PAGE_BYTES
from scheduler.costs import MachineModel
from scheduler.simulate import simulate
from scheduler.timeline import Point, Trace, simulated_trace
from scheduler.timeline.account import account, page_waits
from scheduler.timeline.pages import streamed_bytes
from tests.support.timeline_cases import POSITION, small_program, small_trace

CASES = [("head64_llama3", 6), ("gqa4_llama3_tied", 3), ("ragged_sizes", 1), ("mha", 40)]


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_it_is_the_simulation(name: str, sms: int) -> None:
    """Same steps, same bytes, same idle times; each stamp is rounded to a nanosecond, so sums of n stamps are off by n at
    most."""
    program = small_program(name, sms)
    trace, known = small_trace(name, sms), simulate(program, POSITION)
    steps = np.array([trace.step(token) for token in range(1, trace.tokens)])
    np.testing.assert_allclose(steps, np.array(known.step_times[1:]) * 1e9, atol=2)
    assert streamed_bytes(trace, 1) == known.bytes
    last = trace.tokens - 1
    split = account(trace, [last])
    most = 2 * int(np.diff(program.starts).max()) + 2
    np.testing.assert_allclose(split.drawers["page"], known.idle_page * 1e9, atol=most)
    np.testing.assert_allclose(split.drawers["counter"] + split.drawers["start"], counter_waits(trace, last), atol=most)
    np.testing.assert_allclose(
        page_waits(trace)[last].sum(), known.page_waits.sum() * 1e9 - first_waits(trace, last), atol=10**3
    )


def counter_waits(trace: Trace, token: int) -> np.ndarray:
    """From the end of one instruction to the start of the next, less the fetch, by SM."""
    overhead = round(MachineModel().overhead * 1e9)
    found = np.zeros(trace.program.sms)
    for sm, (start, stop) in enumerate(zip(trace.program.starts, trace.program.starts[1:], strict=False)):
        before = trace.begin(token)
        for i in range(start, stop):
            found[sm] += trace.stamps[token, i, Point.READY] - before - (overhead if i > start else 0)
            before = trace.stamps[token, i, Point.SIGNALLED]
    return found


def first_waits(trace: Trace, token: int) -> int:
    """Waiting for first pages."""
    return int((trace.at(Point.LANDED) - trace.at(Point.STAGED))[token].sum())


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_loaders_obey_the_ring(name: str, sms: int) -> None:
    """A copy lands no earlier than its latency and its turn in the pipe after it was issued; the time waited for free pages
    lies within the time of the load; loaders go through their records in order."""
    program, trace, model = small_program(name, sms), small_trace(name, sms), MachineModel()
    assert trace.landings is not None
    edges = np.concatenate(([0], np.cumsum(program.uses)))
    for sm in range(program.sms):
        end = -1
        for token in range(trace.tokens):
            for i in range(program.starts[sm], program.starts[sm + 1]):
                item, at = trace.items[i], trace.stamps[token, i]
                if not item.pages:
                    assert at[Point.LOAD_BEGUN] == at[Point.LOAD_ENDED] == -1
                    continue
                assert at[Point.LOAD_BEGUN] == max(end, at[Point.LOAD_BEGUN]), "before the load before it had ended"
                assert 0 <= at[Point.LOAD_WAITED] <= at[Point.LOAD_ENDED] - at[Point.LOAD_BEGUN] + item.pages
                last = trace.landings[token, edges[sm] + item.page + item.pages - 1]
                flight = (model.latency + PAGE_BYTES / model.bandwidth) * 1e9
                assert last == 0 or last >= at[Point.LOAD_ENDED] + flight - 2
                assert at[Point.LANDED] >= trace.landings[token, edges[sm] + item.page]
                end = at[Point.LOAD_ENDED]


def test_a_faster_memory_gives_a_faster_trace() -> None:
    program = small_program()
    slow = simulated_trace(program, POSITION, MachineModel(bandwidth=1e10))
    assert slow.step(1) > 2 * small_trace().step(1)
    assert account(slow).share("page") > account(small_trace()).share("page")
