"""How many threads PyTorch computes with on a CPU: as many as are quickest just now.

Every operation ends when the last of its threads does.  Where other programs keep the cores busy, a thread that has to wait
for one makes a token many times slower than fewer threads would: so the choice is made by measuring, not by counting cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REPEATS = 8
ENOUGH = 0.03  # seconds for one number of threads


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quickest(step: Callable[[], object], most: int) -> int:
    """The number of threads, of `most` and its halves, with which `step` takes least; fewer are tried while quicker."""
    if most == 1:
        return 1
    best, least = most, seconds(step, most)
    while best > 1:
        took = seconds(step, best // 2)
        if took >= least:
            break
        best, least = best // 2, took
    return best


def seconds(step: Callable[[], object], count: int) -> float:
    """What one `step` takes on so many threads: the mean of a few after a first, which only warms up."""
    with threads(count):
        step()
        began, done = time.perf_counter(), 0
        while done < REPEATS and (done == 0 or time.perf_counter() - began < ENOUGH):
            step()
            done += 1
        return (time.perf_counter() - began) / done
