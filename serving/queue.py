"""The queue in front of the engine: bounded, and fair between clients.

Clients take turns; the jobs of one client keep their order.  So a client that sends a hundred requests delays another's one
request by one of its own, not by a hundred.  Not for several threads at once: whoever owns it holds a lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from serving.job import Job


class FairQueue:
    """At most `limit` jobs that wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, jobs: Sequence[Job], elsewhere: int = 0) -> bool:
        """Take them all, or none where there is no room beside those that wait here and elsewhere: then False."""
        if self._count + elsewhere + len(jobs) > self.limit:
            return False
        for job in jobs:
            self._waiting.setdefault(job.client, deque()).append(job)
        self._count += len(jobs)
        return True

    def pop(self) -> Job | None:
        """The first job of the client whose turn it is; the client goes to the end."""
        if not self._count:
            return None
        client, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        self._count -= 1
        if jobs:
            self._waiting[client] = jobs
        return job

    def remove(self, job: Job) -> bool:
        """Whether it waited; it does no longer."""
        jobs = self._waiting.get(job.client)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        self._count -= 1
        if not jobs:
            del self._waiting[job.client]
        return True

    def clear(self) -> list[Job]:
        """All that waited."""
        jobs = [job for waiting in self._waiting.values() for job in waiting]
        self._waiting.clear()
        self._count = 0
        return jobs
