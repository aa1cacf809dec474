"""What happens before what within one token: queues and counters, as clocks.

An instruction starts when the one before it in its queue has ended and, for every wait of the same token, all that signal
the counter have ended; and it ends only after those that chose the experts whose pages it takes.  `docs/proof.md` shows why one
token is enough, and why loaders add nothing else here.

Clock of an instruction: for each SM, how many of its queue's instructions have ended before the instruction starts (vector
clocks: Mattern, 1988; queues are the processes).  Instruction a ended before b starts exactly if
clocks[b, sm[a]] > index[a].

That something has ended does not mean that its stores can be seen: only signals that release carry that along.  So there is
a second clock, `visible`, which follows queues and releasing signals alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from scheduler.check.listing import Listing


@dataclass(frozen=True, eq=False)
class Order:
    """What has ended when an instruction starts, and of that what is visible to it, int32 [instructions, sms] both; what is
    visible to whoever sees a counter full, int32 [counters, sms]."""

    clocks: np.ndarray
    visible: np.ndarray
    counter_visible: np.ndarray


def blocking_counters(listing: Listing, i: int) -> set[int]:
    """Counters of the same token that record i waits for."""
    return {wait.counter for wait in listing.items[i].waits if not wait.lag}


def happens_before(listing: Listing) -> tuple[Order | None, list[int]]:
    """The clocks, or None and the records that can never start."""
    count = len(listing.items)
    clocks = np.zeros((count, 2, listing.sms), dtype=np.int32)  # what has ended, and what is visible
    counter_clocks = np.zeros((len(listing.targets), 2, listing.sms), dtype=np.int32)
    waits = [blocking_counters(listing, i) for i in range(count)]
    readers: list[list[int]] = [[] for _ in listing.targets]
    selecting: list[list[int]] = [[] for _ in range(count)]  # who has its pages only when a record has chosen
    for i, counters in enumerate(waits):
        for counter in counters:
            readers[counter].append(i)
        for j in listing.choosers[i]:
            selecting[j].append(i)
    missing = [len(producers) for producers in listing.producers]
    blockers = [len(waits[i]) + bool(listing.index[i]) + len(listing.choosers[i]) for i in range(count)]
    ready = deque(i for i, number in enumerate(blockers) if not number)
    sm_of, index_of, stops = listing.sm.tolist(), listing.index.tolist(), set(listing.starts.tolist())
    ends: dict[int, np.ndarray] = {}
    done = 0
    while ready:
        i = ready.popleft()
        done += 1
        clock = clocks[i]
        for counter in waits[i]:
            np.maximum(clock, counter_clocks[counter], out=clock)
        ended = clock.copy()
        ended[:, sm_of[i]] = index_of[i] + 1
        for j in listing.choosers[i]:  # it may start before they have chosen, but has no page before, and so does not end
            np.maximum(ended[0], ends[j], out=ended[0])
        unblocked = []
        if i + 1 not in stops:
            np.maximum(clocks[i + 1], ended, out=clocks[i + 1])
            unblocked.append(i + 1)
        if selecting[i]:
            ends[i] = ended[0]
            unblocked += selecting[i]
        passed_on = ended if listing.items[i].release else ended[:1]
        for counter in listing.items[i].signals:
            told = counter_clocks[counter, : len(passed_on)]
            np.maximum(told, passed_on, out=told)
            missing[counter] -= 1
            if not missing[counter]:
                unblocked += readers[counter]
        for j in unblocked:
            blockers[j] -= 1
            if not blockers[j]:
                ready.append(j)
    if done < count:
        return None, [i for i in range(count) if blockers[i]]
    return Order(clocks[:, 0], clocks[:, 1], counter_clocks[:, 1]), []
