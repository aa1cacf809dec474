"""The checker's verdict against the truth: every interleaving of tiny programs, explored.

Where the words are sound in themselves and only their order is in question, the verdicts agree exactly: accepted programs
have no fault at all, rejected ones have the fault that the checker names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from models.config import ModelConfig
from scheduler.build import build_program, make_shape
from scheduler.check import check
from scheduler.program import Program
from tests.mutations.draft import MUTATIONS
from tests.mutations.kinds import plant
from tests.support.exhaustive import explore

CONFIG = ModelConfig(
    hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, vocab_size=20
)  # fmt: skip
ORDER_ONLY = ("deadlock", "race")  # kinds of finding about programs whose every record is sound


def make(sms: int, policy: str, slices: int, ring: int | None) -> Program:
    return build_program(make_shape(CONFIG, sms=sms, capacity=512, bucket=512, slices=slices), sms, policy, ring)


PROGRAMS = [
    make(2, "zigzag", 1, None),
    make(3, "round_robin", 2, 5),
    make(2, "critical_path", 2, 4),
    make(3, "balanced", 1, 4),
    make(4, "round_robin", 3, None),
]
KINDS = [kind for kind, plant in MUTATIONS.items() if plant.__module__.endswith((".sync", ".order", ".end"))]
KINDS += ["ring_less_one", "deeper_ring", "exchanged_rows", "exchanged_work"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_sound_programs_have_no_fault(program: Program) -> None:
    assert explore(program) is None


def check_verdicts(seed: int, trials: int, kinds: Sequence[str], programs: Sequence[Program], least: int) -> None:
    """Of so many planted faults the checker must say what exploring finds, and each verdict must come `least` times."""
    random, told = Random(seed), Counter[str]()
    for _ in range(trials):
        kind, program = random.choice(kinds), random.choice(programs)
        mutant = plant(kind, program, random)
        if mutant is None:
            continue
        findings = check(mutant).findings
        verdict = findings[0].kind if findings else "accepted"
        if findings and verdict not in ORDER_ONLY:
            continue
        fault = explore(mutant)
        truth = "accepted" if fault is None else "deadlock" if fault == "deadlock" else "race"
        assert verdict == truth, f"{kind}: {[str(finding) for finding in findings]}, but in truth: {fault}"
        told[verdict] += 1
    assert all(told[verdict] >= least for verdict in ("accepted", *ORDER_ONLY)), "too few of a kind to mean anything"


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_are_the_truth(seed: int) -> None:
    check_verdicts(seed, 200, KINDS, PROGRAMS, 10)
