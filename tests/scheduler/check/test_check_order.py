"""Clocks and cycles, against networkx on random queues and counters."""

from __future__ import annotations

from random import Random

import networkx as nx
import numpy as np
import pytest

from instructions.codec import MAX_SIGNALS, MAX_WAITS, Scheduled, Wait
from instructions.embed import Embed
from scheduler.check.cycle import deadlock_finding
from scheduler.check.listing import Listing
from scheduler.check.order import happens_before
from tests.mutations.programs import random_base

SHAPE = random_base(0).program.shape


def random_listing(random: Random, forward: bool) -> Listing:
    """Instructions on a few SMs that wait for random sets of others; with `forward` only for some before them in one
    random order of all, so that there is no cycle."""
    sms, count = random.randrange(1, 6), random.randrange(1, 25)
    homes = sorted(random.randrange(sms) for _ in range(count))
    starts = np.searchsorted(homes, np.arange(sms + 1)).astype(np.int32)
    turn = random_turns(random, homes) if forward else [0] * count
    signals: list[list[int]] = [[] for _ in range(count)]
    waits: list[list[int]] = [[] for _ in range(count)]
    counters = 0
    for i in range(count):
        for _ in range(random.choice((0, 1, 1, 2))):
            open_to = [j for j in range(count) if len(signals[j]) < MAX_SIGNALS and (not forward or turn[j] < turn[i])]
            if open_to and len(waits[i]) < MAX_WAITS and (forward or random.random() < 0.3):
                for j in random.sample(open_to, random.randrange(1, min(4, len(open_to)) + 1)):
                    signals[j].append(counters)
                waits[i].append(counters)
                counters += 1
    targets = np.array([sum(c in found for found in signals) for c in range(counters)], dtype=np.int32)
    items = [
        Scheduled(
            Embed(0),
            waits=tuple(Wait(c, int(targets[c])) for c in waits[i]),
            signals=tuple(signals[i]),
            release=random.random() < 0.5,
        )
        for i in range(count)
    ]
    sm = np.array(homes, dtype=np.int32)
    index = (np.arange(count) - starts[sm]).astype(np.int32)
    return Listing(SHAPE, 13, items, sm, index, starts, targets, np.zeros(sms, np.int32))


def random_turns(random: Random, homes: list[int]) -> list[int]:
    """A random order of all instructions in which every queue keeps its own."""
    order = list(homes)
    random.shuffle(order)
    places: dict[int, list[int]] = {}
    for i, sm in enumerate(homes):
        places.setdefault(sm, []).append(i)
    turn = [0] * len(homes)
    for number, sm in enumerate(order):
        turn[places[sm].pop(0)] = number
    return turn


def graph_of(listing: Listing, released: bool = False) -> nx.DiGraph:
    """Instruction -> instruction: must have ended before the other starts, or `released`: its stores are visible to it."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(listing.items)))
    for i, item in enumerate(listing.items):
        if listing.index[i]:
            graph.add_edge(i - 1, i)
        for wait in item.waits:
            producers = listing.producers[wait.counter]
            graph.add_edges_from((j, i) for j in producers if listing.items[j].release or not released)
    return graph


@pytest.mark.parametrize("seed", range(40))
def test_clocks_are_reachability(seed: int) -> None:
    """clocks[b, sm[a]] > index[a] exactly where a path leads from a to b; visible, where one of releasing signals does."""
    listing = random_listing(Random(seed), forward=True)
    order, stuck = happens_before(listing)
    assert order is not None and stuck == []
    graph, visible = graph_of(listing), graph_of(listing, released=True)
    for b in range(len(listing.items)):
        for clocks, edges in ((order.clocks, graph), (order.visible, visible)):
            told = {a for a in range(len(listing.items)) if clocks[b, listing.sm[a]] > listing.index[a]}
            assert told == nx.ancestors(edges, b)
    for counter, producers in enumerate(listing.producers):
        released = [p for p in producers if listing.items[p].release]
        needed = set(released).union(*(nx.ancestors(visible, p) for p in released))
        clock = order.counter_visible[counter]
        assert {a for a in range(len(listing.items)) if clock[listing.sm[a]] > listing.index[a]} == needed


def test_stuck_are_those_behind_a_cycle_and_the_cycle_told_is_real() -> None:
    """On 300 random graphs, most of them with cycles."""
    deadlocks = 0
    for seed in range(300):
        listing = random_listing(Random(seed), forward=False)
        graph = graph_of(listing)
        on_cycles = {
            i for part in nx.strongly_connected_components(graph) for i in part if len(part) > 1 or graph.has_edge(i, i)
        }
        behind = on_cycles.union(*(nx.descendants(graph, i) for i in on_cycles))
        order, stuck = happens_before(listing)
        assert set(stuck) == behind and (order is None) == bool(behind)
        if behind:
            deadlocks += 1
            assert_real_cycle(listing, graph, stuck)
    assert 100 < deadlocks < 300


def assert_real_cycle(listing: Listing, graph: nx.DiGraph, stuck: list[int]) -> None:
    """Each hop's second instruction must end before its first starts, and the last leads back to the first."""
    finding = deadlock_finding(listing, stuck)
    places = {f"{listing.sm[i]} #{listing.index[i]} ": i for i in range(len(listing.items))}
    hops = [[places[part.split("[")[0]] for part in hop.split("sm ")[1:]] for hop in finding.details]
    for (later, earlier), (following, _) in zip(hops, [*hops[1:], hops[0]], strict=True):
        assert later == earlier if graph.has_edge(later, later) and len(hops) == 1 else nx.has_path(graph, earlier, later)
        assert earlier == following
    assert (finding.sm, finding.index) == (listing.sm[hops[0][0]], listing.index[hops[0][0]])
