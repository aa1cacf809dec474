"""The one thread that owns the engine, and the queue in front of it.

It gives the engine as many jobs as that has columns, steps it, and hands what came to the jobs.  A job for which the cache has
no room beside the others waits in the engine until one ends, and with it all behind it.  After each step the thread looks who
has left: the engine has at most two launches under way, so a sequence that nobody waits for ends within two.  Where the engine
fails, the sequences under way are told, and it is probed before it is given another; a sequence may also fail alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megakernel.errors import NotNumbers
from models.errors import UserError
from serving.decoder import Decoder
from serving.errors import ApiError, busy
from serving.job import Burst, Failure, Job
from serving.queue import FairQueue

RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0)  # between probes of an engine that fails; the last for ever
STALL_SECONDS = 60.0  # a step that takes longer is told by `health`; no launch does, and no piece of a prompt
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
        self._taken: list[Job] = []  # by the engine, which may let the last of them wait
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
            if not self._queue.push(jobs, self._held_up()):
                waiting, limit = len(self._queue) + self._held_up(), self._queue.limit
                raise busy(f"{waiting} requests are waiting, and no more than {limit} may; {self._load()}", self._wait())
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
            jobs = [*self._queue.clear(), *self._taken]
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

    def load(self) -> str:
        """What the engine has to do at this moment, for who has to wait."""
        with self._changed:
            return self._load()

    def health(self) -> Health:
        """What is true at this moment."""
        with self._changed:
            state, waiting = self._state, self._held_up()
            if not self._thread.is_alive():
                state = "stopped"
            elif self._taken and state == "ok" and time.monotonic() - self._stepped > STALL_SECONDS:
                state = "stalled"
            running = len(self._taken) - waiting
            return Health(state, running, len(self._queue) + waiting, self._faults, self._last_fault)

    def cache_tokens(self) -> int:
        """Tokens in the KV cache of what is under way."""
        return self._decoder.used()

    def _held_up(self) -> int:
        """How many of those that the engine has taken wait there."""
        return sum(not job.began for job in self._taken)

    def _load(self) -> str:
        decoder, running = self._decoder, len(self._taken) - self._held_up()
        return (
            f"{running} of {decoder.columns} sequences are being decoded, "
            f"for which {decoder.reserved()} of {decoder.capacity} tokens of the cache are kept free"
        )

    def _wait(self) -> int:
        ahead = len(self._queue) + len(self._taken)
        return max(1, min(LONGEST_WAIT, round(ahead * self._mean_seconds / self._decoder.columns)))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and not self._taken and not len(self._queue):
                    self._changed.wait()
                if self._closing:
                    break
            self._turn()
        for job in list(self._taken):
            self._release(job)

    def _turn(self) -> None:
        """Give the engine what it has room for, step it once, hand out; whatever fails is told to those whom it befell."""
        try:
            self._admit()
            failed = self._step() if self._taken else {}
        except Exception as error:
            failed = dict.fromkeys(self._taken, error)
        # That its logits are no numbers says something of a sequence, and nothing of the engine.
        faults = [error for error in failed.values() if not isinstance(error, NotNumbers)]
        if faults:
            self._fault(faults[0])
            failed = dict.fromkeys(self._taken, faults[0]) | failed  # one that waits there, too: the probe shall not
        for job, told in failed.items():
            self._release(job)
            self._fail(job, ApiError(500, f"the engine failed: {told}", code="engine_fault"))
        if faults:
            self._recover()
        for job in list(self._taken):
            if job.cancelled:
                self._release(job)

    def _admit(self) -> None:
        while len(self._taken) < self._decoder.columns and not self._held_up():
            with self._changed:
                job = self._queue.pop()
                if job is None:
                    return
                if job.cancelled:
                    continue
                self._taken.append(job)
            self._stepped = time.monotonic()
            try:
                self._decoder.start(job)
            except UserError as error:  # a request that the engine refuses is no fault of it
                self._release(job)
                self._fail(job, ApiError(400, str(error)))
            self._look_who_began()

    def _look_who_began(self) -> None:
        for job in self._taken:
            if not job.began and not self._decoder.waits(job):
                job.began = time.perf_counter()

    def _step(self) -> dict[Job, Exception]:
        """Step, and hand out what came; those that failed are the caller's to tell."""
        progress = self._decoder.step()
        at, self._stepped = time.perf_counter(), time.monotonic()
        failed = {}
        for job, (tokens, finish, error) in progress.items():
            if error is not None:
                failed[job] = error
                continue
            if finish is not None:
                self._mean_seconds += SMOOTHING * (at - job.began - self._mean_seconds)
                with self._changed:
                    self._taken.remove(job)
            if not job.cancelled:
                job.sink(Burst(job, tokens, finish, job.kept, at))
        self._look_who_began()
        return failed

    def _release(self, job: Job) -> None:
        with self._changed:
            self._taken.remove(job)
        self._decoder.stop(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.cancelled:
            job.cancelled = True
            job.sink(Failure(job, error))

    def _fault(self, error: Exception) -> None:
        """Note that the engine has failed."""
        log.error("the engine failed: %s: %s", type(error).__name__, error)
        with self._changed:
            self._faults, self._last_fault = self._faults + 1, f"{type(error).__name__}: {error}"
            if self._state == "ok":
                self._state = "recovering"
        self._on_fault()

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
