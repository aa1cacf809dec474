"""Processes that do a benchmark's work, one measurement each, and that Ctrl-C leaves to the command that started them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started within it never see Ctrl-C, for they begin as this thread is; this process sees it afterwards."""
    resource_tracker.ensure_running()  # as it starts, it lets the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def worker_pool(processes: int) -> Iterator[Pool]:
    """A pool of fresh interpreters, ended with the block: an interrupt would have each of them print a traceback."""
    with interrupts_held():
        pool = multiprocessing.get_context("spawn").Pool(processes)
    with pool:
        yield pool
