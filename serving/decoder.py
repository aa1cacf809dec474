"""What the scheduler asks of an engine: to take jobs in, and to move on all that it has with each step."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from megakernel.engine import Engine, Generation
from megakernel.request import SamplingParams
from serving.job import Job

PROBE = [0]  # a prompt that every model has


class Progress(NamedTuple):
    """What a step gave one job: some tokens, maybe none; `finish` as in `Burst`; `error` where it ended without the rest."""

    tokens: list[int]
    finish: str | None = None
    error: Exception | None = None


class Decoder(Protocol):
    """Owned by one thread.  `columns` sequences at once, which share a cache of `capacity` tokens."""

    columns: int
    capacity: int

    def start(self, job: Job) -> None:
        """Take a job in.  Raises UserError for one that can never be."""

    def waits(self, job: Job) -> bool:
        """Whether a job that was taken in waits for room beside the others."""

    def step(self) -> dict[Job, Progress]:
        """Wait for the device once: what came, of those of whom something came."""

    def stop(self, job: Job) -> None:
        """Let a job go before it has ended; does nothing for one that has."""

    def used(self) -> int:
        """Tokens in the KV cache of the sequences under way.  May be called by any thread."""

    def reserved(self) -> int:
        """Tokens of the KV cache that the sequences under way may come to use."""

    def probe(self) -> None:
        """Decode one token, of no job; raises what goes wrong."""


class EngineDecoder:
    """See `Decoder`; a generation for each job."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.columns, self.capacity = engine.columns, engine.capacity
        self._generations: dict[Job, Generation] = {}

    def start(self, job: Job) -> None:
        self._generations[job] = self._engine.generate(job.prompt, job.max_tokens, job.sampling)

    def waits(self, job: Job) -> bool:
        return job in self._generations and self._generations[job].waiting

    def step(self) -> dict[Job, Progress]:
        self._engine.step()
        came = {}
        for job, generation in self._generations.items():
            try:
                tokens = generation.taken()
            except Exception as error:
                came[job] = Progress([], error=error)
                continue
            if tokens:
                job.kept = generation.kept
                came[job] = Progress(tokens, generation.finish_reason)
        for job, progress in came.items():
            if progress.finish is not None or progress.error is not None:
                del self._generations[job]
        self._engine.settle()  # who has ended makes room for who waits
        return came

    def stop(self, job: Job) -> None:
        generation = self._generations.pop(job, None)
        if generation is not None:
            generation.stop()

    def used(self) -> int:
        return sum(generation.used for generation in list(self._generations.values()))

    def reserved(self) -> int:
        return sum(generation.rows for generation in list(self._generations.values()) if not generation.waiting)

    def probe(self) -> None:
        list(self._engine.generate(PROBE, 1, SamplingParams(), reuse=False))
