"""Who takes the next step: orders in which the machine's actors are interleaved.

A valid program gives the same bits under every one of them; a faulty one is caught by those that stretch its fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

LONGEST_RUN = 6  # random runs last 1 to 2^6 steps; a step is a page request, a load or an instruction's end


class ActorView(Protocol):
    """What an order may look at: whose actor it is, which, and how far it has come."""

    sm: int
    loads: bool
    token: int
    index: int


class Interleaving(Protocol):
    """An order of steps.  It must be a function of its own state and of the calls, so that a run can be repeated."""

    def choose(self, ready: Sequence[ActorView]) -> tuple[int, int]:
        """Place in `ready` (never empty) of the actor to run, and the most steps (at least 1) it may take in a row."""
        ...


class RandomInterleaving:
    """Uniform choice, runs of very different lengths, all drawn from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def choose(self, ready: Sequence[ActorView]) -> tuple[int, int]:
        draw = self.random.random
        return int(draw() * len(ready)), 1 << int(draw() * (LONGEST_RUN + 1))


class PriorityInterleaving:
    """One step at a time for the actor with the smallest key, the first of equals."""

    def __init__(self, key: Callable[[ActorView], tuple[int, ...]]) -> None:
        self.key = key

    def choose(self, ready: Sequence[ActorView]) -> tuple[int, int]:
        return min(range(len(ready)), key=lambda place: self.key(ready[place])), 1


def loaders_first() -> Interleaving:
    """Every loader runs as far ahead as it is let."""
    return PriorityInterleaving(lambda actor: (not actor.loads, actor.sm))


def loaders_last() -> Interleaving:
    """A page is loaded only when nothing else can be done."""
    return PriorityInterleaving(lambda actor: (actor.loads, actor.sm))


def leaders_first() -> Interleaving:
    """The SM farthest behind comes last: skew between SMs grows as far as the waits let it."""
    return PriorityInterleaving(lambda actor: (-actor.token, -actor.index, not actor.loads, actor.sm))


def laggards_first() -> Interleaving:
    """All SMs in step."""
    return PriorityInterleaving(lambda actor: (actor.token, actor.index, actor.loads, actor.sm))


def starving(sm: int) -> Interleaving:
    """One SM runs only when no other can; the others' loaders run first."""
    return PriorityInterleaving(lambda actor: (actor.sm == sm, not actor.loads, -actor.token, -actor.index, actor.sm))


def adversaries(sms: int) -> list[Interleaving]:
    """Orders that stretch what random ones seldom do: one of each kind, and every SM starved in turn."""
    return [loaders_first(), loaders_last(), leaders_first(), laggards_first(), *(starving(sm) for sm in range(sms))]
