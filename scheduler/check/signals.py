"""Counters: a wait asks for exactly what its counter gets in a token."""

from __future__ import annotations

from collections.abc import Iterator

from instructions.codec import Wait
from scheduler.check.findings import Finding
from scheduler.check.listing import Listing


def wait_problem(wait: Wait, signals: int) -> str | None:
    """Why a wait cannot mean "all who signal the counter have finished", or None."""
    if not signals:
        return f"waits for c{wait.counter}, which nobody signals"
    if wait.target > signals:
        return f"waits for {wait.target} signals of c{wait.counter} a token, but it gets {signals}: never met"
    if wait.target < signals:
        return f"waits for {wait.target} signals of c{wait.counter} a token, but it gets {signals}: met too early"
    return None


def signal_findings(listing: Listing) -> Iterator[Finding]:
    """Waits and stated targets that differ from the number of signals."""
    for counter, producers in enumerate(listing.producers):
        if listing.targets[counter] != len(producers):
            message = f"c{counter} is stated to get {listing.targets[counter]} signals a token, it gets {len(producers)}"
            yield Finding("counter", message)
    for i, item in enumerate(listing.items):
        for wait in (*item.waits, *([item.load_wait] if item.load_wait else [])):
            problem = wait_problem(wait, len(listing.producers[wait.counter]))
            if problem:
                yield listing.finding("counter", i, problem)
