"""What one request asks of the engine beyond its prompt.  Light on purpose, so that a command line can refuse bad values
before it imports torch.  Knows nothing of text, models or devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.errors import UserError

LEAST_TEMPERATURE = 1e-6  # below it a logit over the temperature may leave fp32


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from the logits.

    temperature: 0 takes the most likely token; at least 1e-6 divides the logits before the softmax.
    top_k: draw among so many most likely tokens; 0 is off.
    top_p: draw among the fewest tokens whose probabilities sum to at least this, in (0, 1]; 1 is off.
    seed: of the draws, in [0, 2**63).
    stop_token_ids: generation ends after any of these.

    Raises UserError for a value outside these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number of 0 or more, got {self.temperature}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(f"temperature {self.temperature} is too small to divide by: use 0, or at least {LEAST_TEMPERATURE}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie in [0, 2**63), got {self.seed}")
