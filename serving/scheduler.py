"""The one thread that owns the engine, and the queue in front of it.

It fills free slots from the queue, steps the engine, and hands what came to the jobs.  After each step it looks who has left:
the engine has at most two launches under way, so a sequence that nobody waits for ends within two.  Where a step fails, the
sequences under way are told, and the engine is probed before it is given another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.errors import UserError
from serving.decoder import Decoder
from serving.errors import ApiError, busy
from serving.job import Burst, Cancelled, Failure, Job
from serving.queue import FairQueue

RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0)  # between probes of an engine that fails; the last for ever
STALL_SECONDS = 60.0  # a step that takes longer is told by `health`; no launch does, a prompt reports its progress
LONGEST_WAIT = 60  # seconds that a client is told to wait at most
SMOOTHING = 0.2  # weight of the newest in the mean time of a job

log = logging.getLogger("serving")


@dataclass(frozen=True)
class Health:
    """`state`: "ok", "recovering" (after a fault, being probed), "failed" (the probe failed; it is tried again), "stalled" (a
    step has not come back), "stopping" (what runs may end, nothing new is taken), "stopped"."""

    state: str
    running: int
    waiting: int
    faults: int
    last_fault: str | None


class Scheduler:
    """Starts its thread at once; `close` ends it.  All methods but the private ones may be called by any thread."""

    def __init__(self, decoder: Decoder, limit: int, on_fault: Callable[[], None] = lambda: None) -> None:
        self._decoder, self._on_fault = decoder, on_fault
        self._queue = FairQueue(limit)
        self._changed = threading.Condition()
        self._running: dict[int, Job] = {}
        self._state, self._closing = "ok", False
        self._faults = 0
        self._last_fault: str | None = None
        self._stepped = time.monotonic()
        self._mean_seconds = 1.0  # that a job takes of the engine
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of them, or raise the `ApiError` that says why not."""
        with self._changed:
            if self._state == "stopping" or self._closing:
                raise busy("the server is stopping: ask another, or later", 5)
            if self._state == "failed":
                raise busy("the engine has failed and is being tried again", 5)
            if not self._queue.push(jobs):
                raise busy(f"{len(self._queue)} requests are waiting, and no more than {self._queue.limit} may", self._wait())
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it hears nothing more, and takes no more of the engine than what is under way."""
        job.cancelled = True
        with self._changed:
            self._queue.remove(job)

    def drain(self) -> None:
        """Take nothing new; what runs and waits may end."""
        with self._changed:
            self._state = "stopping"

    def abort(self, reason: str) -> None:
        """All that runs and waits ends with an error."""
        with self._changed:
            jobs = [*self._queue.clear(), *self._running.values()]
        for job in jobs:
            self._fail(job, busy(reason, 5))

    def close(self) -> None:
        """End the thread; the engine is the caller's again."""
        self.abort("the server is stopping")
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def retry_after(self) -> int:
        """Seconds after which a request that is refused now had best come again."""
        with self._changed:
            return self._wait()

    def health(self) -> Health:
        """What is true at this moment."""
        with self._changed:
            state = self._state
            if not self._thread.is_alive():
                state = "stopped"
            elif self._running and state == "ok" and time.monotonic() - self._heard() > STALL_SECONDS:
                state = "stalled"
            return Health(state, len(self._running), len(self._queue), self._faults, self._last_fault)

    def cache_tokens(self) -> int:
        """Tokens in the KV cache of what is under way."""
        return self._decoder.used() if self._running else 0

    def _heard(self) -> float:
        """When the engine last gave a sign."""
        return max(self._stepped, *(job.alive for job in self._running.values()))

    def _wait(self) -> int:
        ahead = len(self._queue) + len(self._running)
        return max(1, min(LONGEST_WAIT, round(ahead * self._mean_seconds / self._decoder.slots)))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not self._running and not len(self._queue):
                    self._changed.wait()
                if self._closing:
                    break
            self._turn()
        for slot in list(self._running):
            self._release(slot)

    def _turn(self) -> None:
        """Fill the free slots, step once, hand out; whatever fails is told to those whom it befell."""
        try:
            self._admit()
            if self._running:
                self._step()
        except Exception as error:
            self._fault(error)
            self._recover()
        for slot, job in list(self._running.items()):
            if job.cancelled:
                self._release(slot)

    def _admit(self) -> None:
        for slot in range(self._decoder.slots):
            while slot not in self._running:
                with self._changed:
                    job = self._queue.pop()
                    if job is None:
                        return
                    if not job.cancelled:
                        self._running[slot] = job
                self._stepped = time.monotonic()
                if not job.cancelled:
                    job.began = time.perf_counter()
                    self._start(slot, job)

    def _start(self, slot: int, job: Job) -> None:
        try:
            job.kept = self._decoder.start(slot, job)
        except UserError as error:  # a request that the engine refuses is no fault of it
            with self._changed:
                del self._running[slot]
            self._fail(job, ApiError(400, str(error)))

    def _step(self) -> None:
        try:
            progress = self._decoder.step()
        except Cancelled:
            return  # `_turn` frees the slots of those who left
        at, self._stepped = time.perf_counter(), time.monotonic()
        for slot, (tokens, finish) in progress.items():
            job = self._running[slot]
            if finish is not None:
                self._mean_seconds += SMOOTHING * (at - job.began - self._mean_seconds)
                with self._changed:
                    del self._running[slot]
            if not job.cancelled:
                job.sink(Burst(job, tokens, finish, job.kept, at))

    def _release(self, slot: int) -> None:
        with self._changed:
            del self._running[slot]
        self._decoder.stop(slot)

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.cancelled:
            job.cancelled = True
            job.sink(Failure(job, error))

    def _fault(self, error: Exception) -> None:
        """Those under way are told, each that its request failed."""
        log.error("the engine failed: %s: %s", type(error).__name__, error)
        with self._changed:
            jobs = list(self._running.values())
            self._running.clear()
            self._faults, self._last_fault = self._faults + 1, f"{type(error).__name__}: {error}"
            if self._state == "ok":
                self._state = "recovering"
        self._on_fault()
        for job in jobs:
            self._fail(job, ApiError(500, f"the engine failed: {error}", code="engine_fault"))

    def _recover(self) -> None:
        """Probe the engine until it decodes again.  While it does not, nobody is left waiting for it."""
        tries = 0
        while not self._closing:
            try:
                self._decoder.probe()
            except Exception as error:
                log.error("the engine does not recover: %s: %s", type(error).__name__, error)
                with self._changed:
                    if self._state == "recovering":
                        self._state = "failed"
                    waiting = self._queue.clear()
                for job in waiting:
                    self._fail(job, busy("the engine has failed and is being tried again", 5))
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                tries += 1
                continue
            with self._changed:
                if self._state in ("recovering", "failed"):
                    self._state = "ok"
            log.warning("the engine decodes again")
            return
