"""A program as a networkx graph, read back from its words alone.

Nodes are instructions ("i", sm, index) and counters ("c", number); edges run instruction -> counter (a signal) and
counter -> instruction (a wait).  Going through counters keeps the 1B program at 17,000 edges where instruction ->
instruction would take 800,000.  The graph knows what the program will do, not what it ought to do: that is the checker's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import networkx as nx

from instructions.codec import Scheduled
from models.tape import PAGE_BYTES
from scheduler.costs import MachineModel, preparation
from scheduler.errors import ScheduleError
from scheduler.program import Program

Node = tuple[str | int, ...]  # ("i", sm, index) or ("c", counter)


def program_graph(program: Program, past: int | None = None) -> nx.DiGraph:
    """The program's instructions, counters, signals and waits.

    Instruction nodes carry `item` (its decoded record), `mnemonic`, `layer`, `bytes` (streamed with `past` positions
    cached; by default the most the program serves) and `pages`; counter nodes carry `target`.  Edges carry `kind`:
    "signal", "wait" or "load"; and `lag`: 1 where the wait is for the previous token.  A "load" is the loader's wait; where
    the consumer waits for the same counter there is one edge, of kind "wait", with `load` True.
    """
    past = program.shape.bucket if past is None else past
    graph = nx.DiGraph(sms=program.sms, past=past)
    graph.add_nodes_from((("c", counter), {"target": int(target)}) for counter, target in enumerate(program.targets))
    for sm, queue in enumerate(program.decoded):
        for index, item in enumerate(queue):
            instruction = item.instruction
            graph.add_node(
                ("i", sm, index),
                item=item,
                mnemonic=instruction.MNEMONIC,
                layer=instruction.layer,
                bytes=instruction.cost(program.shape, past).bytes,
                pages=item.pages,
            )
            add_edges(graph, ("i", sm, index), item)
    return graph


def add_edges(graph: nx.DiGraph, node: Node, item: Scheduled) -> None:
    """The signals and waits of one instruction; ScheduleError for a counter that the program does not have."""
    waits = [*item.waits, *([item.load_wait] if item.load_wait else [])]
    for counter in (*item.signals, *(wait.counter for wait in waits)):
        if ("c", counter) not in graph:
            raise ScheduleError(f"{item.instruction} names counter {counter}, which the program does not have")
    graph.add_edges_from((node, ("c", counter), {"kind": "signal", "lag": 0}) for counter in item.signals)
    if item.load_wait is not None:
        graph.add_edge(("c", item.load_wait.counter), node, kind="load", lag=1, load=True)
    for wait in item.waits:
        graph.add_edge(("c", wait.counter), node, kind="wait", lag=wait.lag)


def token_graph(graph: nx.DiGraph, queues: bool = False) -> nx.DiGraph:
    """One token by itself: the graph without the edges that come from the previous token.

    With `queues`, edges of kind "queue" join consecutive instructions of an SM, which run in that order.
    """
    token = nx.DiGraph(**graph.graph)
    token.add_nodes_from(graph.nodes(data=True))
    token.add_edges_from((a, b, data) for a, b, data in graph.edges(data=True) if not data["lag"])
    if queues:
        instructions = sorted(node for node in graph if node[0] == "i")
        token.add_edges_from((a, b, {"kind": "queue", "lag": 0}) for a, b in pairwise(instructions) if a[1] == b[1])
    return token


def check_order(graph: nx.DiGraph) -> None:
    """Raise ScheduleError, naming a cycle, where one token's waits and queues cannot all be satisfied."""
    token = token_graph(graph, queues=True)
    if not nx.is_directed_acyclic_graph(token):
        cycle = [source for source, _ in nx.find_cycle(token)]
        raise ScheduleError(f"deadlock: {' -> '.join(describe(token, node) for node in [*cycle, cycle[0]])}")


def describe(graph: nx.DiGraph, node: Node) -> str:
    """A node in words."""
    if node[0] == "c":
        return f"counter {node[1]}"
    return f"{graph.nodes[node]['mnemonic']} (sm {node[1]} #{node[2]})"


def longest_path(graph: nx.DiGraph, weight: Callable[[Node], float]) -> tuple[float, list[Node]]:
    """The heaviest path through an acyclic graph, its weight the sum over its nodes."""
    finish: dict[Node, float] = {}
    best: dict[Node, Node | None] = {}
    for node in nx.topological_sort(graph):
        before = max(graph.predecessors(node), key=lambda other: finish[other], default=None)
        best[node] = before
        finish[node] = weight(node) + (finish[before] if before is not None else 0.0)
    path: list[Node] = []
    node = max(finish, key=lambda other: finish[other], default=None)
    while node is not None:
        path.append(node)
        node = best[node]
    return max(finish.values(), default=0.0), path[::-1]


def critical_path(program: Program, past: int, model: MachineModel) -> tuple[float, list[Node]]:
    """Seconds of the longest chain of waits and queues in one token, and the chain.

    Every instruction of the chain reads its activations, drains its pages as if they had all landed, and signals; every
    counter costs a hop.  No step can be faster, however wide HBM is.
    """
    graph = program_graph(program, past)
    check_order(graph)
    token = token_graph(graph, queues=True)

    def weight(node: Node) -> float:
        if node[0] == "c":
            return model.hop(token.nodes[node]["target"]) if token.out_degree(node) else 0.0  # some only the next token reads
        attributes = graph.nodes[node]
        pages = min(attributes["pages"], attributes["bytes"] // PAGE_BYTES)
        item = attributes["item"]
        return preparation(item.instruction, program.shape, model) + pages * model.drain + model.ending(item.release)

    return longest_path(token, weight)
