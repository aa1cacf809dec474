"""Programs in GPU memory, each made when it is first asked for, by one thread in the background."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megakernel.gpu.machine import GpuProgram


class Building:
    """Programs by keys, made in the order in which they are first asked for; `made` are those begun so far."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "megakernel-build")
        self.made: dict[Hashable, Future[Any]] = {}

    def get(self, key: Hashable, make: Callable[[], GpuProgram]) -> Future[Any]:
        """The program of a key, which `make` makes; one that could not be made is tried again."""
        known = self.made.get(key)
        if known is None or (known.done() and known.exception() is not None):
            self.made[key] = self.thread.submit(make)
        return self.made[key]

    def ready(self) -> Iterator[GpuProgram]:
        """The programs that are there already."""
        for future in tuple(self.made.values()):
            if future.done() and future.exception() is None:
                yield future.result()

    def resume(self) -> None:
        """Take every program's epoch from its counters, when no launch is under way."""
        for program in self.ready():
            if program.used:
                program.resume()

    def renew(self) -> None:
        """Begin the counters anew of programs whose counters might overflow, when no launch is under way."""
        for program in self.ready():
            if program.worn:
                program.reset()

    def reset(self) -> None:
        """Begin all counters anew, after a fault."""
        for program in self.ready():
            program.reset()

    def close(self) -> None:
        """Make nothing any more, and forget what was made."""
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.made.clear()
