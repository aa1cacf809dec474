"""What the scheduler asks of an engine: some slots, each with a sequence or none, and a step that moves all of them on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from megakernel.engine import Engine
from megakernel.request import SamplingParams
from serving.job import Job

PROBE = [0]  # a prompt that every model has


class Progress(NamedTuple):
    """What a step gave one slot: at least one token; `finish` as in `Burst`."""

    tokens: list[int]
    finish: str | None


class Decoder(Protocol):
    """Owned by one thread.  `slots` sequences at once, of at most `capacity` tokens each, prompt and answer together."""

    slots: int
    capacity: int

    def start(self, slot: int, job: Job) -> int:
        """Begin a sequence in a free slot; the number of its prompt's tokens that the cache holds already."""

    def step(self) -> dict[int, Progress]:
        """Wait for the device once; what came, by slot.  Raises what went wrong, then every sequence is lost; and
        `Cancelled` where a prompt was being read that nobody wants any more, then that slot is free."""

    def stop(self, slot: int) -> None:
        """Free a slot before its sequence has ended."""

    def used(self) -> int:
        """Tokens in the KV cache of the sequences under way."""

    def probe(self) -> None:
        """Decode one token, of no request; raises what goes wrong."""


class EngineDecoder:
    """One slot: the engine decodes one sequence."""

    slots = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.capacity = engine.capacity
        self._length = 0

    def start(self, slot: int, job: Job) -> int:
        """See `Decoder`."""
        self._engine.start(job.prompt, job.max_tokens, job.sampling, progress=job.check)
        self._length = len(job.prompt)
        return self._engine.kept

    def step(self) -> dict[int, Progress]:
        """See `Decoder`."""
        tokens = self._engine.steps()
        self._length += len(tokens)
        return {0: Progress(tokens, self._engine.finish_reason)}

    def stop(self, slot: int) -> None:
        """See `Decoder`."""
        self._engine.stop()
        self._length = 0

    def used(self) -> int:
        """See `Decoder`."""
        return self._length

    def probe(self) -> None:
        """See `Decoder`."""
        self._engine.start(PROBE, 1, SamplingParams(), reuse=False)
        self._engine.steps()
