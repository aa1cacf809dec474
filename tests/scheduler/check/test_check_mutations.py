"""Planted faults of every kind in small real programs: rejected, or shown harmless on the virtual machine.

A seeded sample; `python -m tests.mutations` runs the full campaign.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random

import pytest

from models.families import PRESETS
from scheduler.build import build_program, make_shape
from scheduler.check import check
from tests.mutations.draft import MUTATIONS
from tests.mutations.kinds import KINDS, plant
from tests.mutations.programs import Base, random_base
from tests.mutations.trial import Trial

BASES = 12
MUTANTS = 8  # of each kind
TRIALS = 1  # of these, how many accepted ones go on trial
RUNS = 8

# Kinds that no program survives, wherever they are planted, and those that are no fault at all.
FATAL = {
    "dropped_signal", "extra_signal", "wrong_signal", "target_high", "target_low", "stated_target", "load_target",
    "early_epoch", "crossed_waits", "unknown_counter", "reversed_queue", "shifted_start",
    "lost_instruction", "owned_twice", "overlapping_rows", "missing_row", "shifted_rows", "wrong_head", "wrong_slots",
    "wrong_layer", "wrong_page_count", "wrong_generation", "wrong_tape", "wrong_uses", "shallow_ring", "shared_layers",
    "shared_buffers", "end_not_awaited", "end_awaited_first", "end_awaited_second", "other_end_awaited", "own_end_awaited",
    "two_ends", "end_signalled_twice", "end_handed_over", "other_end", "no_choice", "another_slot",
    "experts_of_another_layer", "counted_from_another_expert",
}  # fmt: skip
HARMLESS = {"exchanged_queues", "last_end_awaited", "renamed_end"}


@cache
def base(number: int) -> Base:
    return random_base(number)


@cache
def homes(kind: str) -> list[int]:
    """The programs with a place for a kind: those of chosen experts have one where there are experts."""
    of_experts = MUTATIONS[kind].__module__.endswith(".experts")
    return [n for n in range(BASES) if not of_experts or base(n).program.shape.config.num_experts]


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_rejected_or_harmless(kind: str) -> None:
    random, verdicts = Random(kind), Counter[bool]()
    trials = 0
    for _ in range(MUTANTS):
        home = base(random.choice(homes(kind)))
        mutant = plant(kind, home.program, random)
        if mutant is None:
            continue
        accepted = check(mutant).valid
        verdicts[accepted] += 1
        if accepted and trials < TRIALS:
            trials += 1
            fault = Trial(home, random).fault(mutant, RUNS)
            assert fault is None, f"accepted in {home}, yet: {fault}"
    assert sum(verdicts.values()) >= MUTANTS // 4, "hardly a place for this kind"
    if kind in FATAL:
        assert not verdicts[True]
    if kind in HARMLESS:
        assert not verdicts[False]


def test_the_virtual_machine_sees_what_the_checker_rejects() -> None:
    """Faults are no matter of taste: of rejected mutants that leave records sound, nearly all misbehave on trial.

    Those that do not need an interleaving that a few runs miss, or a longer launch.
    """
    random, seen = Random(7), Counter[bool]()
    for kind in ("dropped_wait", "stale_epoch", "partial_counter", "swapped_neighbours", "moved_signal", "mixed_tokens"):
        made = 0
        while made < 4:
            home = base(random.randrange(BASES))
            mutant = plant(kind, home.program, random)
            if mutant is None or check(mutant).valid:
                continue
            made += 1
            seen[Trial(home, random).fault(mutant, RUNS) is not None] += 1
    assert seen[True] >= 22, seen


def test_faults_in_the_1b_program() -> None:
    """In the program that matters most, for 132 SMs."""
    program = build_program(make_shape(PRESETS["llama-3.2-1b"], sms=132, capacity=4096, bucket=4096), 132)
    random = Random(3)
    for kind in ("crossed_waits", "dropped_signal", "lost_instruction", "reversed_queue", "shifted_rows", "wrong_generation"):
        mutant = plant(kind, program, random)
        assert mutant is not None
        report = check(mutant)
        assert not report.valid, kind
        assert all(str(finding) for finding in report.findings)
