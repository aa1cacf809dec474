"""The networkx view of a program: nodes and edges are the words', deadlocks are found and named, paths are the longest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructions.codec import Word
from scheduler.errors import ScheduleError
from scheduler.graph import check_order, describe, longest_path, program_graph, token_graph
from scheduler.program import Program
from tests.support.program_cases import preset_program, programs, small_program


@settings(max_examples=25, deadline=None)
@given(programs(most_sms=60))
def test_the_graph_is_what_the_words_say(program: Program) -> None:
    graph = program_graph(program)
    items = {("i", sm, k): item for sm, queue in enumerate(program.decoded) for k, item in enumerate(queue)}
    assert {node for node in graph if node[0] == "i"} == set(items)
    assert {node for node in graph if node[0] == "c"} == {("c", counter) for counter in range(program.counters)}
    signals = {(node, ("c", counter)) for node, item in items.items() for counter in item.signals}
    waits = {(("c", wait.counter), node): wait.lag for node, item in items.items() for wait in item.waits}
    loads = {(("c", item.load_wait.counter), node) for node, item in items.items() if item.load_wait}
    kinds = {
        kind: {(a, b) for a, b, data in graph.edges(data=True) if data["kind"] == kind} for kind in ("signal", "wait", "load")
    }
    assert kinds == {"signal": signals, "wait": set(waits), "load": loads - set(waits)}
    assert {(a, b) for a, b, data in graph.edges(data=True) if data.get("load")} == loads
    for (a, b), lag in waits.items():
        assert graph.edges[a, b]["lag"] == lag
    for counter, target in enumerate(program.targets):
        assert graph.nodes["c", counter]["target"] == target == graph.in_degree(("c", counter))


@settings(max_examples=25, deadline=None)
@given(programs(most_sms=60))
def test_one_token_is_acyclic_and_complete(program: Program) -> None:
    """Without the edges from the token before there is no cycle, queues included, and every instruction leads to the sample."""
    graph = program_graph(program)
    check_order(graph)
    token = token_graph(graph)
    assert set(token) == set(graph)
    assert {data["lag"] for _, _, data in token.edges(data=True)} == {0}
    sample = next(node for node in graph if graph.nodes[node].get("mnemonic") == "sample")
    first = next(node for node in graph if graph.nodes[node].get("mnemonic") in ("embed", "hand_over"))
    instructions = {node for node in graph if node[0] == "i"}
    assert instructions - nx.ancestors(token, sample) == {sample}, "an instruction may outlive its token"
    assert instructions - nx.descendants(token, first) == {first}


def test_edges_stay_few() -> None:
    """Through counters the 1B program has about two edges an instruction; from instruction to instruction, 800,000."""
    program = preset_program("llama-3.2-1b")
    graph = program_graph(program)
    assert graph.number_of_edges() < 3 * len(program.words)
    direct = sum(graph.in_degree(c) * graph.out_degree(c) for c in graph if c[0] == "c")
    assert direct > 500_000


def test_node_attributes() -> None:
    program = small_program("gqa2", 3)
    graph = program_graph(program, past=0)
    attributes = graph.nodes["i", 0, 1]
    item = program.decoded[0][1]
    assert attributes["item"] == item and attributes["pages"] == item.pages
    assert (attributes["mnemonic"], attributes["layer"]) == (item.instruction.MNEMONIC, item.instruction.layer)
    assert Counter(data.get("bytes") for node, data in graph.nodes(data=True) if data.get("mnemonic") == "attention") == {0: 4}
    full = program_graph(program)
    assert Counter(data["bytes"] for _, data in full.nodes(data=True) if data.get("mnemonic") == "attention") == {2 * 16384: 4}


def test_queue_edges_follow_the_queues() -> None:
    program = small_program("mha", 5)
    token = token_graph(program_graph(program), queues=True)
    queued = {(a, b) for a, b, data in token.edges(data=True) if data["kind"] == "queue"}
    nodes = [[("i", sm, k) for k in range(len(queue))] for sm, queue in enumerate(program.decoded)]
    assert queued == {pair for queue in nodes for pair in pairwise(queue)}


def test_a_deadlock_is_named() -> None:
    """Two instructions of one SM, the first waiting for the second: swap a reader before its producer."""
    program = small_program("gqa2", 1)
    words = program.words.copy()
    words[[0, 1]] = words[[1, 0]]
    with pytest.raises(ScheduleError, match=r"deadlock: .*counter \d+ -> .*\(sm 0 #1\)") as caught:
        check_order(program_graph(replace(program, words=words)))
    assert "\n" not in str(caught.value)


def test_a_counter_that_does_not_exist_is_an_error() -> None:
    program = small_program("gqa2", 1)
    words = program.words.copy()
    words[3, Word.SIGNAL] = program.counters
    with pytest.raises(ScheduleError, match=f"names counter {program.counters}, which the program does not have"):
        program_graph(replace(program, words=words))


def test_describe() -> None:
    graph = program_graph(small_program("gqa2", 3))
    assert describe(graph, ("c", 7)) == "counter 7"
    assert describe(graph, ("i", 0, 0)) == "embed (sm 0 #0)"


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20), st.data())
def test_the_longest_path_is_the_longest(size: int, pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    """Against all simple paths of small random graphs, listed."""
    graph = nx.DiGraph()
    graph.add_nodes_from(("i", 0, n) for n in range(size))
    graph.add_edges_from((("i", 0, a), ("i", 0, b)) for a, b in pairs if a < b < size)
    weights = {node: float(data.draw(st.integers(0, 9))) for node in graph}

    def all_paths(node: tuple[str, int, int]) -> list[float]:
        return [weights[node] + rest for b in graph.successors(node) for rest in all_paths(b)] + [weights[node]]

    total, path = longest_path(graph, lambda node: weights[node])
    assert total == max(length for node in graph for length in all_paths(node))
    assert nx.is_path(graph, path) and sum(weights[node] for node in path) == total


def test_the_longest_path_through_nothing() -> None:
    assert longest_path(nx.DiGraph(), lambda node: 1.0) == (0.0, [])
