"""Placement: every policy runs every instruction exactly once, in an order that cannot deadlock, and spreads the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.shape import Shape
from models.families import PRESETS
from scheduler.build import build_program, make_shape
from scheduler.dependencies import members
from scheduler.errors import ScheduleError
from scheduler.place import POLICIES, Queues, stages
from tests.support.configs import small_config
from tests.support.program_cases import Lowered, lowered, preset_program, shapes

POLICY_NAMES = sorted(POLICIES)


def place(case: Lowered, policy: str) -> Queues:
    return POLICIES[policy](case.instructions, case.shape, case.dependencies, case.sms)


def runs_to_the_end(case: Lowered, queues: Queues) -> bool:
    """Whether SMs that run their queues in order, each as far as its waits allow, get through one token."""
    done: set[int] = set()
    left = [list(queue) for queue in queues]
    progress = True
    while progress:
        progress = False
        for queue in left:
            while queue and all(
                wait.lag or done.issuperset(members(case.dependencies.counters[wait.counter]))
                for wait in case.dependencies.waits[queue[0]]
            ):
                done.add(queue.pop(0))
                progress = True
    return len(done) == len(case.instructions)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), sms=st.integers(1, 200))
def test_every_policy_places_everything_once_and_cannot_deadlock(policy: str, data: st.DataObject, sms: int) -> None:
    case = lowered(data.draw(shapes(sms)), sms)
    queues = place(case, policy)
    assert len(queues) == sms
    assert sorted(i for queue in queues for i in queue) == list(range(len(case.instructions)))
    assert runs_to_the_end(case, queues)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_placement_is_the_same_every_time(policy: str) -> None:
    case = lowered(make_shape(small_config("gqa4_llama3_tied"), sms=13, capacity=256, bucket=256), 13)
    assert place(case, policy) == place(case, policy)


@pytest.mark.parametrize("policy", ["round_robin", "zigzag", "balanced"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), sms=st.integers(1, 200))
def test_no_sm_gets_two_of_an_operation_while_another_gets_none(policy: str, data: st.DataObject, sms: int) -> None:
    case = lowered(data.draw(shapes(sms)), sms)
    sm_of = {i: sm for sm, queue in enumerate(place(case, policy)) for i in queue}
    for stage in stages(case.instructions):
        bytes_ = {case.instructions[i].cost(case.shape, case.shape.bucket).bytes for i in stage}
        if policy != "balanced" or len(bytes_) == 1:  # balanced may give one SM two short runs and another a long one
            counts = np.bincount([sm_of[i] for i in stage], minlength=sms)
            assert counts.max() - counts.min() <= 1


def imbalance(shape: Shape, sms: int, policy: str) -> float:
    """Most bytes of an SM over the mean, before the LM head is levelled."""
    case = lowered(shape, sms)
    total = [sum(case.instructions[i].cost(shape, shape.bucket).bytes for i in queue) for queue in place(case, policy)]
    return max(total) * sms / sum(total)


@pytest.mark.parametrize("sms", [132, 114])
def test_balanced_bytes_are_balanced(sms: int) -> None:
    """Greedy balancing leaves the SMs apart by at most about the largest difference within one operation, not by the sum of
    such differences over the layers: one down-projection run and one row block of the rest."""
    shape = make_shape(PRESETS["llama-3.2-1b"], sms=sms, capacity=4096, bucket=128)
    assert imbalance(shape, sms, "balanced") < 1.03
    assert imbalance(shape, sms, "round_robin") > imbalance(shape, sms, "balanced")


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_finished_programs_are_level(policy: str) -> None:
    """Whatever the policy left uneven, the cut of the LM head takes up: within one row block of it, 4 pages."""
    uses = preset_program("llama-3.2-1b", policy=policy).uses
    assert uses.max() - uses.min() <= 4


def test_an_unknown_policy_is_refused() -> None:
    shape = make_shape(small_config("mha"), sms=4, capacity=256, bucket=256)
    with pytest.raises(ScheduleError, match="unknown placement policy 'best'; choose one of round_robin, zigzag"):
        build_program(shape, 4, "best")
