"""Who goes on when: every role of every thread block is an actor, one of them runs at a time, and a seed decides which."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random
from typing import Any

IDLE = 100  # steps of each actor in which nothing is stored, after which nobody comes to an end


class Stuck(AssertionError):
    """Nobody can go on, or nobody comes to an end."""


class Gone(BaseException):
    """The run is over for another reason."""


class Watch:
    """What whoever runs has loaded since it let others go on, as ranges of addresses, and who waits for a store there."""

    loaded: list[tuple[int, int]] = []
    waiting: list[Actor] = []
    stores = 0
    let_others: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def store(cls, first: int, last: int) -> None:
        """Something was stored at addresses `first` to `last`: who has looked there may look again."""
        cls.stores += 1
        for actor in cls.waiting:
            actor.awake = actor.awake or any(low <= last and first <= high for low, high in actor.looked)


class Actor:
    """One role of a block."""

    def __init__(self, number: int, block: Any) -> None:
        self.number, self.block = number, block
        self.turn = threading.Semaphore(0)
        self.until: Callable[[], bool] | None = None
        self.rather: Callable[[], bool] | None = None
        self.looked: list[tuple[int, int]] = []
        self.awake = True


class Grid:
    """Actors, and copies under way that land between their steps, the oldest of any first or later."""

    def __init__(self, seed: int) -> None:
        self.random, self.steps = Random(seed), 0
        self.stores = self.idle = 0
        self.actors: list[Actor] = []
        self.copies: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.here = threading.local()

    @property
    def actor(self) -> Actor:
        return self.here.actor

    def run(self, blocks: list[tuple[Any, Callable[[], None]]]) -> None:
        """Run one actor for each block, and all that they start, to the end."""
        Watch.loaded, Watch.waiting = [], []
        Watch.let_others = self.pause
        for block, body in blocks:
            self.add(block, body)
        self.hand_over()
        self.over.wait()
        if self.error is not None:
            raise self.error

    def add(self, block: Any, body: Callable[[], None]) -> Actor:
        """Another actor, which runs when its turn comes."""
        actor = Actor(len(self.actors), block)
        self.actors.append(actor)
        threading.Thread(target=self.live, args=(actor, body), daemon=True).start()
        return actor

    def live(self, actor: Actor, body: Callable[[], None]) -> None:
        """An actor's whole life."""
        self.here.actor = actor
        actor.turn.acquire()
        try:
            if self.error is None:
                body()
        except Gone:
            pass
        except BaseException as error:
            self.error = self.error or error
        self.actors.remove(actor)
        self.hand_over()

    def pause(self, until: Callable[[], bool] | None = None, rather: Callable[[], bool] | None = None) -> None:
        """Let others go on; come back when it is so, and `rather` only then."""
        actor = self.actor
        actor.until, actor.rather, actor.looked = until, rather, Watch.loaded
        actor.awake = until is not None or not actor.looked
        Watch.loaded = []
        Watch.waiting.append(actor)
        self.hand_over()
        actor.turn.acquire()
        Watch.waiting.remove(actor)
        if self.error is not None:
            raise Gone

    def hand_over(self) -> None:
        """Choose who goes on next."""
        self.steps += 1
        if Watch.stores != self.stores:
            self.stores, self.idle = Watch.stores, 0
        self.idle += 1
        if self.error is None and self.idle > IDLE * (len(self.actors) + 1):
            self.error = Stuck(f"nothing has been stored for {self.idle} steps")
        if self.error is not None:
            if self.actors:
                self.actors[0].turn.release()
            else:
                self.over.set()
            return
        while self.copies and (self.random.random() < 0.5 or not self.able()):
            self.copies.pop(self.random.randrange(min(len(self.copies), 4)))()
        able = self.able()
        if able:
            self.random.choice(able).turn.release()
        elif self.actors:
            self.error = Stuck("nobody can go on")
            self.actors[0].turn.release()
        else:
            self.over.set()

    def able(self) -> list[Actor]:
        """Who can go on; those that would only look once more at what they have seen, where there is nobody else."""
        found = [actor for actor in self.actors if actor.until is None or actor.until()]
        return [actor for actor in found if actor.awake and (actor.rather is None or actor.rather())] or found
