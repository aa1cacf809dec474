"""The critical path through one step: followed back from its end, what each instruction was kept from starting by.

An instruction begins when the one before it in its queue has signalled and its waits are met; whichever came last is its
predecessor.  So the hops join end to end, and their lengths add up to the step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from instructions.codec import NONE
from scheduler.timeline.account import page_waits
from scheduler.timeline.trace import Point, Trace
from scheduler.timeline.waits import Bindings, bindings


@dataclass(frozen=True)
class Hop:
    """One instruction on the path, nanoseconds.

    `after` is what it had to wait for: the mnemonic of a producer, that of the instruction before it "on the same SM", or
    "token"; `gap` the time from there until its waits were met; the rest is its own.
    """

    record: int
    name: str
    after: str
    gap: int
    staging: int
    page: int
    computing: int
    storing: int
    signalling: int

    @property
    def length(self) -> int:
        """From the predecessor's signal to its own."""
        return self.gap + self.staging + self.page + self.computing + self.storing + self.signalling

    @property
    def kind(self) -> str:
        """What hops are put together by."""
        return f"{self.after} → {self.name}"


PARTS = ("gap", "staging", "page", "computing", "storing", "signalling")


def hop(trace: Trace, token: int, i: int, after: str, since: int, waited: int) -> Hop:
    """The hop of record i, whose predecessor signalled at `since`; `waited` for pages after the first."""
    at = [int(trace.stamps[token, i, point]) for point in (Point.READY, Point.STAGED, Point.LANDED, Point.COMPUTED)]
    ready, staged, landed, computed = at
    stored, signalled = (int(trace.stamps[token, i, point]) for point in (Point.STORED, Point.SIGNALLED))
    return Hop(
        record=i,
        name=str(trace.mnemonics[i]),
        after=after,
        gap=ready - since,
        staging=staged - ready,
        page=landed - staged + waited,
        computing=computed - landed - waited,
        storing=stored - computed,
        signalling=signalled - stored,
    )


def critical_hops(trace: Trace, token: int, found: Bindings | None = None) -> list[Hop]:
    """The path through a token, from its begin to its end.

    Where signals seem later than the waits they met (clocks that disagree), a gap is negative by as much.
    """
    found = found or bindings(trace)
    waited = page_waits(trace)[token]
    hops: list[Hop] = []
    i = trace.last
    while True:
        queued = int(trace.stamps[token, i - 1, Point.SIGNALLED]) if trace.index[i] else trace.begin(token)
        counter = found.counter[token, i] != NONE and not found.lag[token, i]
        if counter and found.time[token, i] >= queued:
            producer = int(found.producer[token, i])
            hops.append(hop(trace, token, i, str(trace.mnemonics[producer]), int(found.time[token, i]), int(waited[i])))
            i = producer
        elif trace.index[i]:
            hops.append(hop(trace, token, i, f"{trace.mnemonics[i - 1]} on the same SM", queued, int(waited[i])))
            i -= 1
        else:
            hops.append(hop(trace, token, i, "token", queued, int(waited[i])))
            return hops[::-1]


@dataclass(frozen=True)
class HopKind:
    """All hops of one kind: how many, nanoseconds in all, and the mean of each part by name as in PARTS."""

    kind: str
    count: int
    total: int
    parts: dict[str, float]


def hop_kinds(hops: list[Hop]) -> list[HopKind]:
    """Hops put together, the dearest kind first."""
    groups: dict[str, list[Hop]] = defaultdict(list)
    for one in hops:
        groups[one.kind].append(one)
    kinds = [
        HopKind(
            kind,
            len(members),
            sum(one.length for one in members),
            {part: float(np.mean([getattr(one, part) for one in members])) for part in PARTS},
        )
        for kind, members in groups.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.total)
