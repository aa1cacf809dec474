"""One program's share of the campaign: plant faults of every kind in it, count what becomes of them.

Stands apart from the command because worker processes import it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from random import Random

import torch

from scheduler.check import check
from tests.mutations.kinds import KINDS, plant
from tests.mutations.programs import Base, random_base, wide_base
from tests.mutations.trial import Trial


@dataclass(frozen=True)
class Task:
    """Mutants of one program: `rounds` of each kind; every `probe`-th rejected one goes on trial (0: none)."""

    seed: int
    wide: bool
    rounds: int
    runs: int
    probe: int


@dataclass
class Tally:
    """What became of the mutants of one kind."""

    made: int = 0
    rejected: int = 0
    harmless: int = 0
    misbehaved: int = 0
    probed: int = 0
    probed_faults: int = 0
    findings: dict[str, int] = field(default_factory=dict)  # kind of the first finding: how often

    def add(self, other: Tally) -> None:
        """Take in another tally of the same kind."""
        for name, value in asdict(other).items():
            if name != "findings":
                setattr(self, name, getattr(self, name) + value)
        for kind, count in other.findings.items():
            self.findings[kind] = self.findings.get(kind, 0) + count


def run_task(task: Task) -> tuple[dict[str, Tally], list[str]]:
    """Tallies by kind, and what every accepted mutant that misbehaved did."""
    torch.set_num_threads(1)
    base = wide_base(task.seed) if task.wide else random_base(task.seed)
    random, tallies, complaints = Random(task.seed), {kind: Tally() for kind in KINDS}, []
    trial = Trial(base, random)
    for kind in [*KINDS] * task.rounds:
        complaint = try_mutant(kind, base, trial, random, tallies[kind], task)
        if complaint:
            complaints.append(f"{kind} in program {task.seed}, {base}: {complaint}")
    return tallies, complaints


def try_mutant(kind: str, base: Base, trial: Trial, random: Random, tally: Tally, task: Task) -> str | None:
    """Plant one fault and see; returns what an accepted mutant did wrong."""
    mutant = plant(kind, base.program, random)
    if mutant is None:
        return None
    tally.made += 1
    findings = check(mutant).findings
    if not findings:
        fault = trial.fault(mutant, task.runs)
        tally.harmless += fault is None
        tally.misbehaved += fault is not None
        return fault
    tally.rejected += 1
    tally.findings[findings[0].kind] = tally.findings.get(findings[0].kind, 0) + 1
    if task.probe and random.randrange(task.probe) == 0:
        tally.probed += 1
        tally.probed_faults += trial.fault(mutant, task.runs) is not None
    return None
