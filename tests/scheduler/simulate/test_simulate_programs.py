"""Simulations of real programs: the bounds no step can beat, where the time went, and requests that make no sense."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.codec import Word
from models.families import PRESETS
from models.tape import PAGE_BYTES
from scheduler.build import make_shape, schedule
from scheduler.costs import MACHINES, MachineModel, activation_bytes, preparation
from scheduler.errors import ScheduleError
from scheduler.graph import critical_path, program_graph, token_graph
from scheduler.program import Program
from scheduler.simulate import Simulation, simulate
from tests.support.program_cases import preset_program, programs, small_program

H100 = MACHINES["h100"]
BOTTLENECKS = st.sampled_from(
    [H100, MACHINES["h200"], replace(H100, bandwidth=1e9), replace(H100, copies=1), replace(H100, drain=5e-6, poll=0.0)]
)


def busy(program: Program, result: Simulation) -> np.ndarray:
    """Seconds each SM's consumer works, counted from the instructions themselves."""
    model, seconds = result.model, []
    for queue in program.decoded:
        total = 0.0
        for item in queue:
            uses = range(item.pages)
            pages = sum(item.instruction.page_source(program.shape, item.tape, use, result.past) is not None for use in uses)
            own = preparation(item.instruction, program.shape, model) + pages * model.drain + model.ending(item.release)
            total += model.overhead + own
        seconds.append(total)
    return np.array(seconds)


@settings(max_examples=40, deadline=None)
@given(programs(most_sms=40), BOTTLENECKS, st.data())
def test_no_step_beats_its_bounds(program: Program, model: MachineModel, data: st.DataObject) -> None:
    past = data.draw(st.integers(0, program.shape.bucket))
    result = simulate(program, past, model)
    chain, _ = critical_path(program, past, model)
    streamed = sum(
        item.instruction.cost(program.shape, past).bytes for queue in program.decoded for item in queue if item.pages
    )
    slack = 1 - 1e-9
    tokens = len(result.step_times)  # all of them, because a ring may hold a token's pages when the one before it ends
    assert sum(result.step_times) >= tokens * streamed / model.bandwidth * slack
    assert result.step_time >= (chain + model.poll) * slack, "the chain, and the poll for the end of the token before"
    assert result.step_time >= busy(program, result).max() * slack


@settings(max_examples=40, deadline=None)
@given(programs(most_sms=40), BOTTLENECKS)
def test_busy_and_idle_make_the_step(program: Program, model: MachineModel) -> None:
    result = simulate(program, program.shape.bucket, model)
    assert (result.idle_counter >= 0).all() and (result.idle_page >= 0).all() and (result.idle_done >= 0).all()
    assert busy(program, result) + result.idle == pytest.approx(np.full(program.sms, result.step_time), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(programs(most_sms=20))
def test_time_stamps_keep_the_order_of_the_program(program: Program) -> None:
    """Within an SM one after another; a reader starts a poll after the last of those it waits for has signalled."""
    result = simulate(program, 0)
    signalled = np.zeros(program.counters)
    for start, queue in zip(program.starts, program.decoded, strict=False):
        for index, item in enumerate(queue):
            for counter in item.signals:
                signalled[counter] = max(signalled[counter], result.ended[start + index])
    for start, queue in zip(program.starts, program.decoded, strict=False):
        for index, item in enumerate(queue):
            here = start + index
            assert result.arrived[here] < result.started[here] < result.ended[here]
            assert index == 0 or result.arrived[here] == pytest.approx(result.ended[here - 1])
            for wait in item.waits:
                assert wait.lag or result.started[here] >= signalled[wait.counter] + result.model.poll - 1e-12
    assert result.ended.max() == pytest.approx(result.step_time), "the step is counted from the token before's end"


@pytest.fixture(scope="module")
def llama_1b() -> Simulation:
    return simulate(preset_program("llama-3.2-1b"), 96)


def test_the_1b_step(llama_1b: Simulation) -> None:
    """Between what HBM allows and the published times of this model on an H100; all weights and one page of K and V a head."""
    program = preset_program("llama-3.2-1b")
    pages = program.shape.tape.streamed_pages + 16 * 8 * 2
    assert llama_1b.bytes == pages * PAGE_BYTES + 2048 * 2
    assert llama_1b.bytes / H100.bandwidth < llama_1b.step_time < 973e-6
    assert llama_1b.bandwidth < H100.bandwidth


def test_the_steady_state_is_reached_at_once(llama_1b: Simulation) -> None:
    """The second and the third token take the same time within 1 %; the first starts with an empty ring."""
    first, second, third = llama_1b.step_times
    assert second == pytest.approx(third, rel=0.01)
    assert first == pytest.approx(third, rel=0.05)


def test_the_result_is_the_same_every_time(llama_1b: Simulation) -> None:
    again = simulate(preset_program("llama-3.2-1b"), 96)
    assert again.step_times == llama_1b.step_times and np.array_equal(again.ended, llama_1b.ended)


def test_a_faster_memory_helps_and_longer_contexts_cost(llama_1b: Simulation) -> None:
    assert simulate(preset_program("llama-3.2-1b"), 96, MACHINES["h200"], tokens=2).step_time < llama_1b.step_time
    at_the_start = simulate(preset_program("llama-3.2-1b"), 0, tokens=2)
    assert at_the_start.bytes == llama_1b.bytes - 16 * 8 * 2 * PAGE_BYTES
    assert at_the_start.step_time <= llama_1b.step_time


@pytest.mark.parametrize(
    ("policy", "bucket", "past", "slices", "measured"),
    [  # docs/notebook: placement.md, copies.md, attention.md; milliseconds
        ("balanced", 256, 96, 1, 0.870),
        pytest.param("zigzag", 256, 96, 1, 0.902, marks=pytest.mark.full),
        ("round_robin", 256, 96, 1, 0.923),
        pytest.param("balanced", 4096, 960, 2, 0.927, marks=pytest.mark.full),
        pytest.param("balanced", 4096, 960, 8, 0.904, marks=pytest.mark.full),
        ("balanced", 4096, 2000, 16, 0.936),
    ],
)
def test_the_model_foretells_the_first_kernel(policy: str, bucket: int, past: int, slices: int, measured: float) -> None:
    """Within 3 % of what an H100 measured, over placements, contexts and slices, when every signal still released and 2 copies
    in flight drew 2.95 TB/s."""
    model = replace(H100, signal=H100.release, bandwidth=2.95e12)
    shape = make_shape(PRESETS["llama-3.2-1b"], sms=132, capacity=4096, bucket=bucket, slices=slices)
    step = simulate(schedule(shape, 132, policy, None), past, model, tokens=2).step_time
    assert step == pytest.approx(measured * 1e-3, rel=0.03)


@pytest.mark.parametrize(
    ("machine", "name", "bucket", "past", "measured"),
    [  # docs/performance.md, milliseconds; at 4,000 docs/notebook/signals.md
        ("h100", "llama-3.2-1b", 256, 96, 0.804),
        ("h100", "llama-3.2-1b", 4096, 1024, 0.821),
        ("h100", "llama-3.2-1b", 4096, 4000, 0.854),
        ("h100", "llama-3.2-3b", 256, 96, 2.129),
        ("h200", "llama-3.2-1b", 256, 96, 0.590),
        ("h200", "llama-3.2-1b", 4096, 1024, 0.609),
        ("h200", "llama-3.2-1b", 4096, 4000, 0.644),
    ],
)
def test_the_model_foretells_the_kernel(machine: str, name: str, bucket: int, past: int, measured: float) -> None:
    """Within 3 % of what was measured."""
    shape = make_shape(PRESETS[name], sms=132, capacity=4096, bucket=bucket)
    step = simulate(schedule(shape, 132, "balanced", None), past, MACHINES[machine], tokens=2).step_time
    assert step == pytest.approx(measured * 1e-3, rel=0.03)


def test_a_shallow_ring_slows_the_1b_step(llama_1b: Simulation) -> None:
    """A ring of 4 pages cannot bridge the waits; so it is what run-ahead is worth under this model."""
    shallow = simulate(replace(preset_program("llama-3.2-1b"), ring=4), 96, tokens=2)
    assert shallow.step_time > 1.1 * llama_1b.step_time


def test_activations_are_what_a_greedy_step_reads() -> None:
    program = small_program("gqa2", 3)
    instructions = {item.instruction.MNEMONIC: item.instruction for queue in program.decoded for item in queue}
    sizes = {name: activation_bytes(instruction, program.shape) for name, instruction in instructions.items()}
    assert sizes["embed"] == 4  # the token
    assert sizes["qkv"] == sizes["gate_up"] == sizes["lm_head"] == 64 * 4  # the residual stream
    assert sizes["attention"] == 2 * 16 * 4 + 2 * 16 * 4  # the group's queries and one row of K and V, in fp32
    assert sizes["sample"] == 3 * 2 * 4  # the best of each run, not the vocabulary


def program_with(changes: dict[int, int]) -> Program:
    program = small_program("gqa2", 3)
    words = program.words.copy()
    for word, value in changes.items():
        words[5, word] = value
    return replace(program, words=words)


@pytest.mark.parametrize(
    ("changes", "past", "tokens", "message"),
    [
        ({}, -1, 2, "position -1 in a program made for positions 0 to 128"),
        ({}, 129, 2, "position 129 in a program made for positions 0 to 128"),
        ({}, 0, 1, "1 tokens to simulate"),
        ({Word.TARGET: 99}, 0, 2, "waits for 99 signals of counter"),
        ({Word.WAIT: 9999}, 0, 2, "signals of counter 9999"),
        ({Word.SIGNAL: -1}, 0, 2, "deadlock"),
    ],
)
def test_requests_that_make_no_sense(changes: dict[int, int], past: int, tokens: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        simulate(program_with(changes), past, tokens=tokens)
    assert "\n" not in str(caught.value)


def test_a_program_without_an_end_is_refused() -> None:
    program = small_program("gqa2", 1)
    shorter = replace(program, words=program.words[:-1], starts=program.starts - np.array([0, 1], dtype=np.int32))
    with pytest.raises(ScheduleError, match="no sample instruction"):
        simulate(shorter, 0)


def test_the_critical_path_is_a_chain_of_the_program() -> None:
    program = preset_program("llama-3.2-1b")
    seconds, path = critical_path(program, 96, H100)
    token = token_graph(program_graph(program), queues=True)
    assert nx.is_path(token, path)
    assert [token.nodes[node]["mnemonic"] for node in (path[0], path[-1])] == ["embed", "sample"]
    assert sum(node[0] == "c" for node in path) >= 16 * 5, "five hops a layer: QKV, attention, output, gate and up, down"
    assert seconds < simulate(program, 96, tokens=2).step_time
