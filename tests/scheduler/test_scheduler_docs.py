"""docs/scheduler.md shows real lines of a real program and real predictions: a change of the scheduler must change them too.

The lines come from `python -m scheduler --model llama-3.2-1b --bucket 256 --disassemble`, the figures from
`python -m scheduler.simulate`.
"""

from __future__ import annotations

import re

import pytest

from scheduler.costs import MACHINES, MachineModel
from scheduler.graph import critical_path, program_graph
from scheduler.place import POLICIES
from scheduler.simulate import simulate
from tests.support import ROOT
from tests.support.program_cases import preset_program

TEXT = (ROOT / "docs" / "scheduler.md").read_text(encoding="utf-8")


def test_the_excerpt_is_of_the_real_program() -> None:
    (excerpt,) = re.findall(r"```\n(sm .*?)```", TEXT, flags=re.DOTALL)
    lines = excerpt.splitlines()
    assert len(lines) == 8
    assert set(lines) <= set(preset_program("llama-3.2-1b").disassembly())


def test_its_numbers_are_right() -> None:
    program = preset_program("llama-3.2-1b")
    assert f"{len(program.words)} instructions" in TEXT
    assert f"{program_graph(program).number_of_edges():,} edges and {program.counters} counters" in TEXT
    assert f"({program.uses.min()} to {program.uses.max()} pages an SM" in TEXT
    kept = sum(item.load_wait is not None for queue in program.decoded for item in queue)
    assert f"Of the 128 of the 1B program, {kept} are left" in TEXT


@pytest.mark.parametrize("machine", list(MACHINES))
def test_the_prediction_is_the_models(machine: str) -> None:
    """To 1 %, which is less than a change worth telling."""
    (row,) = re.findall(r"^\| `balanced` \|([ \d|]+)\|$", TEXT, flags=re.MULTILINE)
    steps = row.split("|")[::4]  # of each machine the step, then three idle times
    said = dict(zip(MACHINES, steps, strict=True))[machine]
    program = preset_program("llama-3.2-1b")
    assert simulate(program, 96, MACHINES[machine], tokens=2).step_time * 1e6 == pytest.approx(float(said), rel=0.01)
    chain, _ = critical_path(program, 96, MACHINES[machine])
    assert f"the critical path, {chain * 1e6:.0f} µs" in TEXT


def test_every_policy_and_cost_is_named() -> None:
    assert all(f"| `{policy}` |" in TEXT for policy in POLICIES)
    shortened = TEXT.replace("`_bandwidth`", "`activation_bandwidth`")
    assert [name for name in MachineModel.__dataclass_fields__ if name != "name" and f"`{name}`" not in shortened] == []
