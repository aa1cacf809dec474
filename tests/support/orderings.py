"""Brute force, to check the derivation against: every pair of accesses, several tokens unrolled, and what really follows
from a program's waits and queues.

Deliberately naive: no closures shared between instructions, no bit tricks, none of the scheduler's own code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import product

import networkx as nx

from instructions.base import Instruction, Region
from instructions.codec import Wait
from instructions.embed import Embed
from instructions.hand_over import HandOver
from instructions.lm_head import LmHead
from instructions.sample import Sample
from instructions.shape import Shape
from scheduler.dependencies import Dependencies
from scheduler.program import Program

Moment = tuple[int, int]  # token, instruction in program order


def overlap(one: Region, other: Region) -> bool:
    """Whether two regions share a row."""
    same = (one.buffer, one.layer) == (other.buffer, other.layer)
    return same and max(one.start, other.start) < min(one.stop, other.stop)


def touch(ones: Iterable[Region], others: Iterable[Region]) -> bool:
    """Whether any two regions share a row."""
    return any(overlap(one, other) for one, other in product(ones, others))


def needed(instructions: list[Instruction], shape: Shape) -> Iterator[tuple[str, Moment, Moment]]:
    """Every ordering that two successive tokens need: (kind, what must have ended, before what starts).

    Kinds: "raw" and "war" between consumers; "load" where the loader of the second reads what the first wrote.  Two writes
    of one row are one instruction's, a token apart, in order on its SM.
    """
    reads = [instruction.reads(shape) for instruction in instructions]
    writes = [instruction.writes(shape) for instruction in instructions]
    loads = [instruction.loads(shape) for instruction in instructions]
    count = range(len(instructions))
    for i, j in product(count, count):
        if touch(writes[i], reads[j]):
            yield "raw", (1 if i < j else 0, i), (1, j)  # the latest write before the read
        if i != j and touch(reads[i], writes[j]):
            yield "war", (1 if i < j else 0, i), (1, j)
        if touch(writes[i], loads[j]):
            yield "load", (0, i), (1, j)


def stage(instruction: Instruction) -> tuple[int, int]:
    """Where an instruction stands in program order; those of one stage touch no common row."""
    if isinstance(instruction, Embed | HandOver):
        return -1, instruction.OPCODE
    if isinstance(instruction, LmHead | Sample):
        return 1_000_000, instruction.OPCODE
    return instruction.layer, instruction.OPCODE


class Ordered:
    """What has ended when something starts, by the waits alone, whatever the placement."""

    def __init__(self, deps: Dependencies, tokens: int) -> None:
        self.signals: dict[int, list[int]] = {}
        for i, counters in enumerate(deps.signals):
            for counter in counters:
                self.signals.setdefault(counter, []).append(i)
        self.tokens, self.deps = tokens, deps

    def direct(self, moment: Moment, wait: Wait) -> list[Moment]:
        """What one wait of an instruction waits for."""
        token, _ = moment
        return [(token - wait.lag, i) for i in self.signals[wait.counter]] if token >= wait.lag else []

    def before(self, moment: Moment, waits: Iterable[Wait] | None = None) -> set[Moment]:
        """All that has ended when a moment starts; with `waits`, as if it had no others."""
        found: set[Moment] = set()
        todo = deque([(moment, self.deps.waits[moment[1]] if waits is None else waits)])
        while todo:
            here, its_waits = todo.popleft()
            for wait in its_waits:
                for earlier in self.direct(here, wait):
                    if earlier not in found:
                        found.add(earlier)
                        todo.append((earlier, self.deps.waits[earlier[1]]))
        return found


def machine_order(program: Program, tokens: int) -> nx.DiGraph:
    """What precedes what on the machine, from the words alone: ("start" | "end" | "load", token, sm, index).

    A "load" is the issue of an instruction's first page use.  Edges: waits, load waits, queues, the loader's own order, and
    the ring: a page use is filled after the use `ring` earlier was released, which its consumer does after it starts.
    """
    graph = nx.DiGraph()
    producers: dict[int, list[tuple[int, int]]] = {}
    for sm, queue in enumerate(program.decoded):
        for index, item in enumerate(queue):
            for counter in item.signals:
                producers.setdefault(counter, []).append((sm, index))
    for sm, queue in enumerate(program.decoded):
        previous_end: tuple | None = None
        previous_load: tuple | None = None
        owners: list[tuple[int, int, int]] = []
        for token in range(tokens):
            for index, item in enumerate(queue):
                here = (token, sm, index)
                graph.add_edge(("start", *here), ("end", *here))
                for wait in item.waits:
                    if token >= wait.lag:
                        sources = producers[wait.counter]
                        graph.add_edges_from((("end", token - wait.lag, *source), ("start", *here)) for source in sources)
                if previous_end:
                    graph.add_edge(previous_end, ("start", *here))
                previous_end = ("end", *here)
                if not item.pages:
                    continue
                graph.add_edge(("load", *here), ("end", *here))
                if previous_load:
                    graph.add_edge(previous_load, ("load", *here))
                previous_load = ("load", *here)
                if item.load_wait and token:
                    sources = producers[item.load_wait.counter]
                    graph.add_edges_from((("end", token - 1, *source), ("load", *here)) for source in sources)
                if len(owners) >= program.ring:
                    graph.add_edge(("start", *owners[len(owners) - program.ring]), ("load", *here))
                owners += [here] * item.pages
    return graph
