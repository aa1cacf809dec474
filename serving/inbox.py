"""Where the events of one request meet: from the engine's thread, from the client's connection, from a clock."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from serving.job import Event


@dataclass(frozen=True)
class Left:
    """The client has gone."""


@dataclass(frozen=True)
class Late:
    """A time limit has passed."""


class Inbox:
    """Made by the thread of the event loop, which alone takes from it; any thread may put."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event | Left | Late] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event | Left | Late) -> None:
        """Add an event, and wake who waits."""
        self._events.append(event)
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Event | Left | Late:
        """The next event."""
        while not self._events:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._events.popleft()
