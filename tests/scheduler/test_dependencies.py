"""Dependencies: what the regions demand, found by brute force, follows from the waits; and no wait is there for nothing."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.attention import Attention
from instructions.base import Instruction
from instructions.choose import Choose
from instructions.codec import NONE, Word
from instructions.down import Down
from instructions.embed import Embed
from instructions.expert_down import ExpertDown
from instructions.expert_gate_up import ExpertGateUp
from instructions.hand_over import HandOver
from instructions.o_proj import OProj
from instructions.qkv import Qkv
from instructions.registry import INSTRUCTIONS
from instructions.router import Router
from scheduler.build import make_shape
from scheduler.dependencies import derive, members
from scheduler.errors import ScheduleError
from scheduler.lower import lower
from scheduler.program import Program
from tests.support.configs import small_config
from tests.support.orderings import Ordered, machine_order, needed, stage
from tests.support.program_cases import Lowered, lowered, programs, shapes, small_program

NAMES = ["mha", "gqa4_llama3_tied", "gqa8", "head24_odd_blocks", "ragged_sizes", "all_biases_linear_head24"]
CASES = [(name, sms, slices) for name in NAMES for sms, slices in ((1, 1), (3, 1), (5, 2), (16, 3), (61, 1))]


def check_waits(case: Lowered) -> None:
    ordered = Ordered(case.dependencies, tokens=3)
    before = {i: ordered.before((2, i)) for i in range(len(case.instructions))}
    for kind, (token, i), (_, j) in needed(case.instructions, case.shape):
        if kind != "load":
            assert (token + 1, i) in before[j], f"{kind}: {case.instructions[j]} may start before {case.instructions[i]} ended"


def check_no_wait_is_redundant(case: Lowered) -> None:
    ordered = Ordered(case.dependencies, tokens=3)
    for i, waits in enumerate(case.dependencies.waits):
        for wait in waits:
            others = ordered.before((2, i), [other for other in waits if other is not wait])
            left = set(ordered.direct((2, i), wait)) - others
            assert left, f"{case.instructions[i]}: its wait {wait} follows from its other waits"


@pytest.mark.parametrize(("name", "sms", "slices"), CASES)
def test_every_needed_ordering_follows_from_the_waits(name: str, sms: int, slices: int) -> None:
    shape = make_shape(small_config(name), sms=sms, capacity=256, bucket=256, slices=slices)
    check_waits(lowered(shape, sms))


@pytest.mark.parametrize(("name", "sms", "slices"), CASES)
def test_no_wait_follows_from_the_others(name: str, sms: int, slices: int) -> None:
    shape = make_shape(small_config(name), sms=sms, capacity=256, bucket=256, slices=slices)
    check_no_wait_is_redundant(lowered(shape, sms))


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 24))
def test_both_hold_for_any_model(data: st.DataObject, sms: int) -> None:
    case = lowered(data.draw(shapes(sms)), sms)
    check_waits(case)
    check_no_wait_is_redundant(case)


def check_machine_order(program: Program) -> None:
    """Everything needed, loads included, holds on the machine, by what the words say."""
    graph = machine_order(program, tokens=2)
    assert nx.is_directed_acyclic_graph(graph), "the program deadlocks"
    places = {item.instruction: (sm, k) for sm, queue in enumerate(program.decoded) for k, item in enumerate(queue)}
    instructions = sorted(places, key=stage)
    after = {node: nx.descendants(graph, node) for node in graph if node[0] == "end"}
    for kind, (token, i), (later_token, j) in needed(instructions, program.shape):
        end = ("end", token, *places[instructions[i]])
        start = ("load" if kind == "load" else "start", later_token, *places[instructions[j]])
        if start in graph:  # without a past page there is no load
            assert start in after[end], f"{kind}: {start} may come before {end}"


@pytest.mark.parametrize("policy", ["round_robin", "zigzag", "balanced", "critical_path"])
@pytest.mark.parametrize(("name", "sms"), [("gqa2", 1), ("mqa_linear", 4), ("head64_llama3", 9)])
def test_loads_follow_the_writes_of_the_token_before(name: str, sms: int, policy: str) -> None:
    """With one SM and few, rings are passed through often enough that load waits are dropped; none too many may be."""
    program = small_program(name, sms, policy, bucket=256)
    check_machine_order(program)


@settings(max_examples=15, deadline=None)
@given(programs(most_sms=12))
def test_loads_follow_the_writes_in_any_program(program: Program) -> None:
    check_machine_order(program)


def test_the_brute_force_sees_every_missing_wait() -> None:
    """Each wait of a program in turn is taken away; the check above must object to each."""
    case = lowered(make_shape(small_config("gqa2"), sms=5, capacity=256, bucket=256, slices=2), 5)
    waits = case.dependencies.waits
    for i, own in enumerate(waits):
        for wait in own:
            fewer = [*waits[:i], tuple(other for other in own if other is not wait), *waits[i + 1 :]]
            with pytest.raises(AssertionError, match="may start before"):
                check_waits(case._replace(dependencies=replace(case.dependencies, waits=fewer)))


@pytest.mark.parametrize("change", [{Word.LOAD_WAIT: NONE}, {Word.WAITS: 0}])
def test_the_brute_force_sees_missing_waits_in_words(change: dict[Word, int]) -> None:
    program = small_program("gqa4_llama3_tied", 40, bucket=256)  # so few pages an SM that the ring alone orders no load
    words = program.words.copy()
    for word, value in change.items():
        words[:, word] = value
    with pytest.raises(AssertionError, match="may come before"):
        check_machine_order(replace(program, words=words))


def test_some_load_waits_are_dropped_and_some_are_not() -> None:
    """Otherwise the tests above would not have seen both."""
    items = [item for queue in small_program("gqa4_llama3_tied", 1, bucket=256).decoded for item in queue if item.pages]
    attention = [item for item in items if isinstance(item.instruction, Attention)]
    kept = sum(item.load_wait is not None for item in attention)
    assert 0 < kept < len(attention)


def test_dependencies_are_as_fine_as_the_regions() -> None:
    """Attention of a KV head waits for that head's rows alone, and a down projection for the whole MLP."""
    shape = make_shape(small_config("mha"), sms=12, capacity=256, bucket=128)
    case = lowered(shape, 12)
    producers = {
        i: [set(members(case.dependencies.counters[wait.counter])) for wait in waits]
        for i, waits in enumerate(case.dependencies.waits)
    }
    for i, instruction in enumerate(case.instructions):
        if isinstance(instruction, Attention):
            for mask in producers[i]:
                kinds = {(type(case.instructions[j]), case.instructions[j].layer) for j in mask}
                assert kinds == {(Qkv, instruction.layer)}
            written = [region for mask in producers[i] for j in mask for region in case.instructions[j].writes(shape)]
            rows = shape.group_rows
            assert {r.start // rows for r in written if r.buffer == "q"} == {instruction.head}


def test_a_residual_row_needs_no_wait_of_its_own() -> None:
    """Attention's chain already implies that the residual rows are there: one wait per output projection."""
    case = lowered(make_shape(small_config("gqa2"), sms=6, capacity=256, bucket=128), 6)
    for instruction, waits in zip(case.instructions, case.dependencies.waits, strict=True):
        if isinstance(instruction, OProj | Down):
            assert len(waits) == 1


def test_targets_count_producers() -> None:
    case = lowered(make_shape(small_config("gqa8"), sms=7, capacity=256, bucket=256), 7)
    deps = case.dependencies
    for counter, mask in enumerate(deps.counters):
        assert [i for i, signals in enumerate(deps.signals) if counter in signals] == members(mask)
    for wait in (wait for waits in deps.waits for wait in waits):
        assert wait.target == deps.counters[wait.counter].bit_count()


def without(kind: type[Instruction], program: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in program if not isinstance(instruction, kind)]


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_a_row_that_nobody_writes_is_an_error(kind: type[Instruction]) -> None:
    name = "mixtral" if kind in (Router, Choose, ExpertGateUp, ExpertDown) else "gqa2"
    shape = make_shape(small_config(name), sms=4, capacity=256, bucket=256, slices=2, tail=kind is HandOver)
    with pytest.raises(ScheduleError, match=r"row \d+ of .* is read but nobody writes it"):
        derive(without(kind, lower(shape, 4)), shape)


def test_a_row_that_two_write_is_an_error() -> None:
    shape = make_shape(small_config("gqa2"), sms=4, capacity=256, bucket=256)
    program = lower(shape, 4)
    with pytest.raises(ScheduleError, match=r"Embed.* and Embed.* both write row 0 of x\[0\]"):
        derive([Embed(0), *program], shape)
    overlapping = [*program[:1], Qkv(0, program[1].block, program[1].blocks + 1), *program[2:]]  # type: ignore[attr-defined]
    with pytest.raises(ScheduleError, match="both write row"):
        derive(overlapping, shape)
