"""The critical path: hops that join end to end, from the begin of the step to its end, through whoever was last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.costs import MachineModel
from scheduler.simulate.engine import run_jobs
from scheduler.simulate.jobs import Job, Jobs, jobs_of
from scheduler.timeline import Point
from scheduler.timeline.path import critical_hops, hop_kinds
from scheduler.timeline.simulated import engine_trace
from tests.support.timeline_cases import POSITION, measured, random_stamps, small_program, small_trace

CASES = [("head64_llama3", 6), ("gqa4_llama3_tied", 3), ("mha", 40)]


@pytest.mark.parametrize(("name", "sms"), CASES)
def test_simulated_hops_join(name: str, sms: int) -> None:
    trace = small_trace(name, sms)
    for token in range(trace.tokens):
        hops = critical_hops(trace, token)
        assert sum(hop.length for hop in hops) == trace.step(token)
        assert hops[-1].record == trace.last and hops[0].after == "token"
        assert all(min(hop.gap, hop.staging, hop.page, hop.computing, hop.signalling) >= 0 for hop in hops)
        for one, two in zip(hops, hops[1:], strict=False):
            same_queue = two.record == one.record + 1 and trace.index[two.record] > 0
            shared = {wait.counter for wait in trace.items[two.record].waits} & set(trace.items[one.record].signals)
            assert same_queue or shared, "a hop joins neighbours in a queue, or a signal and its reader"
            assert two.gap == trace.stamps[token, two.record, Point.READY] - trace.stamps[token, one.record, Point.SIGNALLED]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), case=st.sampled_from(CASES))
def test_hops_of_any_stamps_add_up(seed: int, case: tuple[str, int]) -> None:
    trace = measured(small_program(*case), random_stamps(small_program(*case), seed))
    for token in range(2):
        assert sum(hop.length for hop in critical_hops(trace, token)) == trace.step(token)


def slowed(jobs: Jobs, sm: int, index: int, seconds: float) -> Jobs:
    """The same jobs, one of them with a longer preparation."""
    queues = [list(queue) for queue in jobs.queues]
    old = queues[sm][index]
    queues[sm][index] = Job(old.before + seconds, old.after, old.pages, old.waits, old.load_wait, old.signals)
    return Jobs(tuple(tuple(queue) for queue in queues), jobs.targets, jobs.ring, jobs.last)


@pytest.mark.parametrize("mnemonic", ["qkv", "attention", "combine", "o_proj", "gate_up", "down", "lm_head"])
def test_a_planted_delay_is_found(mnemonic: str) -> None:
    """One instruction that prepares for 100 us must stand on the path, with its 100 us in the right part."""
    program, model = small_program(), MachineModel()
    record = int(np.flatnonzero(small_trace().mnemonics == mnemonic)[0])
    sm, index = int(small_trace().sm[record]), int(small_trace().index[record])
    jobs = slowed(jobs_of(program, POSITION, model), sm, index, 100e-6)
    trace = engine_trace(program, POSITION, run_jobs(jobs, model, 3))
    [hop] = [hop for hop in critical_hops(trace, 2) if hop.record == record]
    assert 100_000 <= hop.staging < 102_000


def test_kinds_sum_what_they_put_together() -> None:
    trace = small_trace()
    hops = critical_hops(trace, 1)
    kinds = hop_kinds(hops)
    assert sum(kind.total for kind in kinds) == trace.step(1) and sum(kind.count for kind in kinds) == len(hops)
    assert [kind.total for kind in kinds] == sorted((kind.total for kind in kinds), reverse=True)
    for kind in kinds:
        assert sum(kind.parts.values()) * kind.count == pytest.approx(kind.total)
