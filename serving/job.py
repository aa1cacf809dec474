"""One sequence to decode, and what comes of it: what passes between the threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megakernel.request import SamplingParams


@dataclass(frozen=True)
class Burst:
    """Tokens that came together.  `finish` is "stop" or "length" at the end; `kept` counts the prompt's tokens whose keys and
    values were in the cache; `at` is a time of `time.perf_counter`."""

    job: Job
    tokens: list[int]
    finish: str | None
    kept: int
    at: float


@dataclass(frozen=True)
class Failure:
    """The sequence ends without the rest of its tokens."""

    job: Job
    error: Exception


Event = Burst | Failure


@dataclass(eq=False)
class Job:
    """A prompt and how to go on from it.  `client` is whose turn it takes in the queue; `sink` is told what comes, by the
    thread that owns the engine, and must not wait."""

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    client: str
    sink: Callable[[Event], None]
    cancelled: bool = field(default=False, init=False)
    kept: int = field(default=0, init=False)
    began: float = field(default=0.0, init=False)  # when the engine had room for it, by time.perf_counter; 0: not yet
