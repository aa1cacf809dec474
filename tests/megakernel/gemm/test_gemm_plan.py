"""A skinny product's plan: every part of every tile has one block, blocks are even; the device counts as the host does."""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakernel.device.gemm import share as device
from megakernel.gemm.plan import (
    BOX,
    CONSUMER_ROWS,
    CONSUMERS,
    SHARED_BYTES,
    Cut,
    Plan,
    Problem,
    choose_plan,
    make_plan,
)
from models.errors import UserError

PROBLEMS = st.builds(
    Problem,
    tokens=st.integers(1, 64),
    rows=st.integers(1, 70_000),
    columns=st.integers(1, 2_000).map(lambda lines: 16 * lines),
    wide=st.booleans(),
)
SMS = st.integers(1, 160)


def assert_covers(plan: Plan) -> None:
    """Every step of every tile once, in order; even; whoever begins a tile, and the numbers of those who go on with it."""
    due = (0, 0)  # tile and step that comes next
    loads = []
    for block in range(plan.cut.blocks):
        runs = plan.runs(block)
        loads.append(sum(run.last - run.first for run in runs))
        for run in runs:
            assert (run.tile, run.first) == due and run.first < run.last <= plan.steps
            due = (run.tile, run.last) if run.last < plan.steps else (run.tile + 1, 0)
        assert all(run.last - run.first == plan.steps for run in runs[1:-1]), "a block shares two tiles at most"
    assert due == (plan.tiles, 0)
    assert max(loads) - min(loads) <= 1 and min(loads) >= 1


@given(PROBLEMS, SMS, st.booleans())
def test_the_plan_chosen_covers_every_tile_once(problem: Problem, sms: int, early: bool) -> None:
    plan = choose_plan(problem, sms, early)
    assert plan.cut.blocks <= sms
    assert plan.tiles * plan.cut.consumers * CONSUMER_ROWS >= problem.rows
    assert plan.steps * plan.cut.boxes * BOX >= problem.columns
    assert plan.cut.residents * plan.cut.slots * plan.step_bytes <= SHARED_BYTES
    assert plan.tiling.tokens >= problem.tokens
    assert_covers(plan)


@given(PROBLEMS, st.sampled_from(CONSUMERS), st.sampled_from([1, 2]), SMS)
def test_any_cut_covers_every_tile_once(problem: Problem, consumers: int, boxes: int, blocks: int) -> None:
    assert_covers(make_plan(problem, consumers, boxes, blocks))


def run_on_host(function: object) -> object:
    """A device function of plain integers as a Python function: its source, with `where` and `minimum` of integers."""
    [source] = ast.parse(inspect.getsource(function.fn)).body  # type: ignore[attr-defined]
    assert isinstance(source, ast.FunctionDef)
    source.decorator_list.clear()
    language = SimpleNamespace(where=lambda condition, one, other: one if condition else other, minimum=min)
    names: dict[str, object] = {"gl": language}
    exec(compile(ast.Module([source], []), "device", "exec"), names)
    return names[source.name]


@given(PROBLEMS, SMS)
def test_the_device_shares_as_the_host_does(problem: Problem, sms: int) -> None:
    plan = choose_plan(problem, sms)
    share = SimpleNamespace(steps=plan.steps, least=plan.least, more=plan.more)
    first_unit, block_of = run_on_host(device.first_unit), run_on_host(device.block_of)
    for block in range(plan.cut.blocks):
        begin, end = plan.first_unit(block), plan.first_unit(block + 1)
        assert first_unit(share, block) == begin  # type: ignore[operator]
        assert {block_of(share, unit) for unit in (begin, (begin + end) // 2, end - 1)} == {block}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ((0, 64, 64), "0 tokens: a skinny product takes 1 to 64"),
        ((65, 64, 64), "65 tokens: a skinny product takes 1 to 64"),
        ((1, 0, 64), "W has 0 rows"),
        ((1, 64, 0), "0 columns: TMA takes a multiple of 16"),
        ((1, 64, 24), "24 columns: TMA takes a multiple of 16; pad"),
        ((1, 1 << 21, 1 << 16), "split its rows"),
    ],
)
def test_problems_that_are_refused(problem: tuple[int, int, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Problem(*problem)


@pytest.mark.parametrize(
    ("cut", "complaint"),
    [
        ((3, 1, 4, 1), "3 consumers: use one of 1, 2, 4"),
        ((1, 0, 4, 1), "at least one box and two slots"),
        ((1, 1, 1, 1), "at least one box and two slots"),
        ((1, 1, 25, 1), "25 slots of 9216 bytes do not fit shared memory: use at most 24"),
        ((1, 1, 13, 1, 2), "13 slots of 9216 bytes do not fit shared memory: use at most 12"),
        ((4, 1, 2, 1, 2), "2 residents of 4 consumers: use 1, or 2 of at most two consumers"),
        ((1, 1, 4, 1, 3), "3 residents"),
        ((1, 1, 4, 0), "0 thread blocks for 8 units of work: use 1 to 8"),
        ((1, 1, 4, 9), "9 thread blocks for 8 units of work: use 1 to 8"),
    ],
)
def test_cuts_that_are_refused(cut: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Plan(Problem(1, 128, 512), Cut(*cut))
