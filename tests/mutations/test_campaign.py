"""The campaign runs, and ends in a line of JSON that says what it claims."""

from __future__ import annotations

import json

import pytest

from tests.mutations.__main__ import main as mutation_bench
from tests.mutations.campaign import Task, run_task
from tests.mutations.kinds import KINDS
from tests.mutations.programs import random_base


def test_the_campaign_counts_every_mutant() -> None:
    """Each one planted is rejected, harmless or wrong; and the same seed makes the same mutants."""
    tallies, complaints = run_task(Task(seed=1, wide=False, rounds=1, runs=1, probe=10))
    assert complaints == [] and set(tallies) == set(KINDS) and len(KINDS) >= 20
    for tally in tallies.values():
        assert tally.made == tally.rejected + tally.harmless <= 1
        assert sum(tally.findings.values()) == tally.rejected >= tally.probed >= tally.probed_faults
    assert sum(tally.made for tally in tallies.values()) > 40
    again, _ = run_task(Task(seed=1, wide=False, rounds=1, runs=1, probe=10))
    assert again == tallies


def test_the_campaign_tells_an_accepted_mutant_that_misbehaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checker that accepts everything, the trials find the faults, and the command exits 1."""

    class Blind:
        findings = ()

    def in_this_process(tasks: list[Task]) -> list[object]:
        return [run_task(task) for task in tasks]

    monkeypatch.setattr("tests.mutations.campaign.check", lambda program: Blind)
    monkeypatch.setattr("tests.mutations.campaign.KINDS", ("dropped_signal", "exchanged_queues"))
    monkeypatch.setattr("tests.mutations.__main__.run_all", lambda tasks, jobs: in_this_process(tasks))
    assert mutation_bench(["--mutants", "2", "--wide", "0", "--runs", "2"]) == 1
    out = capsys.readouterr().out.splitlines()
    record = json.loads(out[-1])
    assert record["misbehaved"] == record["kinds"]["dropped_signal"]["misbehaved"] == 2
    assert record["kinds"]["exchanged_queues"]["harmless"] == record["kinds"]["exchanged_queues"]["made"]
    assert sum(line.startswith("dropped_signal in program ") for line in out) == 2


@pytest.mark.parametrize(("seed", "columns"), [(55, (1, 4)), (36, (4, 1))])
def test_faults_in_programs_of_several_columns(monkeypatch: pytest.MonkeyPatch, seed: int, columns: tuple[int, int]) -> None:
    """A sample of the kinds; none that the checker accepts misbehaves."""
    shape = random_base(seed).program.shape
    assert (shape.sequences, shape.depth) == columns
    monkeypatch.setattr("tests.mutations.campaign.KINDS", KINDS[seed % 5 :: 5])
    tallies, complaints = run_task(Task(seed=seed, wide=False, rounds=1, runs=1, probe=5))
    assert complaints == []
    assert sum(tally.rejected for tally in tallies.values()) > 5
    assert sum(tally.misbehaved for tally in tallies.values()) == 0
