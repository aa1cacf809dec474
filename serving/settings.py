"""What a server is told beside its model: where it listens, whom it answers, how long and how much."""

from __future__ import annotations

from dataclasses import dataclass, field

from megakernel.request import SamplingParams

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """`answer_tokens`: of a chat's answer where the request does not say, None: what fits; `queue`: sequences that may wait;
    `queue_seconds`: how long one may, until it is refused; `answer_seconds`: how long an answer may take from its arrival on;
    `body_bytes` of a request; `grace_seconds`: what running answers have after SIGTERM."""

    answer_tokens: int | None = None
    queue: int = 64
    queue_seconds: float = 60.0
    answer_seconds: float = 600.0
    body_bytes: int = 4 * MIB
    grace_seconds: float = 30.0


@dataclass(frozen=True)
class Identity:
    """How the server calls what it serves.  `sampling` is what holds where a request says nothing."""

    model: str
    fingerprint: str
    end_tokens: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
