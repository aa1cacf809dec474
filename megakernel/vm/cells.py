"""Numbers that only grow, actors that wait for them, and the loop that runs the actors one step at a time.

Every synchronisation of the machine is a wait for such a number: a counter, the pages an SM has loaded or released, the
tokens finished.  A blocked actor is woken by the step that makes its wait true; nobody polls.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from megakernel.vm.interleaving import Interleaving


class Cell:
    """A monotonic number and those who wait for it."""

    __slots__ = ("name", "value", "waiting")

    def __init__(self, name: str, value: int = 0) -> None:
        self.name, self.value = name, value
        self.waiting: list[Actor] = []

    def add(self, amount: int, ready: list[Actor]) -> None:
        """Raise the number, and move every actor whose wait is now met to `ready`."""
        self.value += amount
        if self.waiting:
            still: list[Actor] = []
            for actor in self.waiting:
                (still if actor.need is not None and actor.need.want > self.value else ready).append(actor)
            self.waiting = still


class Need(NamedTuple):
    """What a blocked actor yields: go on when `cell` has reached `want`; whether a token is opened then."""

    cell: Cell
    want: int
    opens: bool = False


Steps = Generator[Need | None, None, None]


class Actor:
    """A loader or a consumer of one SM.  `token` and `index` (place in its queue) say how far it has come."""

    loads = False

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self.token = 0
        self.index = 0
        self.need: Need | None = None
        self.steps: Steps = self.run()

    def run(self) -> Steps:
        """The actor's program: yields None where others may run, a `Need` where it cannot go on."""
        raise NotImplementedError


class Stuck(Exception):
    """No actor can go on."""


def run_actors(ready: list[Actor], consumers: int, interleaving: Interleaving) -> None:
    """Run until `consumers` consumers have ended; raises `Stuck` when nobody can take a step before that.

    `ready` holds every actor at first; the cells put woken ones back.  Loaders still at work then had nothing more to do.
    """
    while consumers:
        if not ready:
            raise Stuck
        place, steps = interleaving.choose(ready)
        actor = ready[place]
        for _ in range(steps):
            try:
                need = next(actor.steps)
            except StopIteration:
                consumers -= 0 if actor.loads else 1
                break
            if need is not None:
                actor.need = need
                need.cell.waiting.append(actor)
                break
        else:
            continue
        # Swap with the last instead of shifting: actors woken meanwhile stand behind, so the place is still the actor's.
        ready[place] = ready[-1]
        ready.pop()
