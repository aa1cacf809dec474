"""Deadlock, explained: the shortest cycle of instructions that wait for one another.

Nodes are records and counters (record i is i, counter c is c plus the number of records), so that a counter of many
signals costs as many edges as it has signals, not signals times readers.  A record's choice of experts is a counter, too,
behind the others: whoever selects by it waits for it.
"""

from __future__ import annotations

from collections import deque

from scheduler.check.findings import Finding
from scheduler.check.listing import Listing
from scheduler.check.order import blocking_counters

MAX_STARTS = 32  # records from which the shortest cycle is looked for


def signallers(listing: Listing, counter: int) -> list[int]:
    """Who signals a counter; of a record's choice that record."""
    choice = counter - len(listing.targets)
    return [choice] if choice >= 0 else listing.producers[counter]


def blockers_of(listing: Listing, stuck: list[int]) -> dict[int, list[int]]:
    """What each record that never starts, and each counter among them, waits for."""
    count, members = len(listing.items), set(stuck)
    blockers: dict[int, list[int]] = {}
    for i in stuck:
        behind = [i - 1] if listing.index[i] and i - 1 in members else []
        choices = [len(listing.targets) + j for j in listing.choosers[i] if j in members]
        counters = [*sorted(blocking_counters(listing, i)), *choices]
        blockers[i] = behind + [count + counter for counter in counters]
        for counter in counters:
            if count + counter not in blockers:
                blockers[count + counter] = [j for j in signallers(listing, counter) if j in members]
    return blockers


def cyclic_core(blockers: dict[int, list[int]]) -> set[int]:
    """The nodes left after taking away, over and over, those that no other waits for: all cycles and what joins them."""
    dependents = dict.fromkeys(blockers, 0)
    for found in blockers.values():
        for j in found:
            dependents[j] += 1
    free = [i for i, number in dependents.items() if not number]
    core = set(blockers)
    while free:
        i = free.pop()
        core.discard(i)
        for j in blockers[i]:
            dependents[j] -= 1
            if not dependents[j]:
                free.append(j)
    return core


def cycle_through(blockers: dict[int, list[int]], core: set[int], start: int) -> list[int]:
    """The shortest cycle through a node, each node followed by what it waits for; empty where there is none."""
    came_from: dict[int, int] = {}
    frontier = deque([start])
    while frontier and start not in came_from:
        i = frontier.popleft()
        for j in blockers[i]:
            if j in core and j not in came_from:
                came_from[j] = i
                frontier.append(j)
    if start not in came_from:
        return []
    cycle = [came_from[start]]
    while cycle[-1] != start:
        cycle.append(came_from[cycle[-1]])
    return cycle[::-1]


def hops(listing: Listing, cycle: list[int]) -> list[tuple[int, int, int | None]]:
    """A cycle as (record, record it waits for, by which counter), the queue being None; runs along a queue are one hop."""
    count, found = len(listing.items), list[tuple[int, int, int | None]]()
    first = next(place for place, node in enumerate(cycle) if node >= count) - 1  # queues alone make no cycle
    cycle = cycle[first:] + cycle[:first]
    for place, node in enumerate(cycle):
        following = cycle[(place + 1) % len(cycle)]
        if node >= count:
            continue
        if following >= count:
            found.append((node, cycle[(place + 2) % len(cycle)], following - count))
        elif found and found[-1][2] is None:
            found[-1] = (found[-1][0], following, None)
        else:
            found.append((node, following, None))
    return found


def explain(listing: Listing, i: int, j: int, counter: int | None) -> str:
    """One hop in words."""
    if counter is None:
        return f"{listing.place(i)} stands in the queue behind {listing.place(j)}"
    if counter >= len(listing.targets):
        return f"{listing.place(i)} has its pages only after {listing.place(j)} has chosen them"
    return f"{listing.place(i)} waits for c{counter}, which is full only after {listing.place(j)}"


def deadlock_finding(listing: Listing, stuck: list[int]) -> Finding:
    """One finding for all records that never start, with the shortest cycle found hop by hop."""
    blockers = blockers_of(listing, stuck)
    core = cyclic_core(blockers)
    starts = [i for i in sorted(core) if i < len(listing.items)]
    step = max(len(starts) // MAX_STARTS, 1)
    cycles = [cycle_through(blockers, core, start) for start in starts[::step]]
    best = min((hops(listing, cycle) for cycle in cycles if cycle), key=len)
    message = f"{len(stuck)} instructions can never start; this one waits for itself, by way of"
    return listing.finding("deadlock", best[0][0], message, tuple(explain(listing, *hop) for hop in best))
