"""What one request asks of the engine beyond its prompt.  Light on purpose, so that a command line can refuse bad values
before it imports torch.  Knows nothing of text, models or devices."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from models.config import TOKEN_LIMIT
from models.errors import UserError, quoted

LEAST_TEMPERATURE = 1e-6  # below it a logit over the temperature may leave fp32
MOST_TEMPERATURE = 1e37  # above it 1 over the temperature is no normal number of fp32
SEED_LIMIT = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from the logits.

    temperature: 0 takes the most likely token; from 1e-6 to 1e37 divides the logits before the softmax.
    top_k: draw among so many most likely tokens; 0 is off.
    top_p: draw among the fewest tokens whose probabilities sum to at least this, in (0, 1]; 1 is off.
    seed: of the draws, in [0, 2**63).
    stop_token_ids: generation ends after any of these.

    Numbers of NumPy and the like become Python's own.  Raises UserError for a value outside these ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        values = {
            "temperature": _number("temperature", self.temperature),
            "top_k": _integer("top_k", self.top_k),
            "top_p": _number("top_p", self.top_p),
            "seed": _integer("seed", self.seed),
            "stop_token_ids": _token_ids(self.stop_token_ids),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # as frozen dataclasses do it themselves
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise UserError(f"temperature must be 0 or more, and at most {MOST_TEMPERATURE:g}, got {self.temperature}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(f"temperature {self.temperature} is too small to divide by: use 0, or at least {LEAST_TEMPERATURE}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {quoted(self.top_k)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < SEED_LIMIT:
            raise UserError(f"seed must lie in [0, 2**63), got {quoted(self.seed)}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass  # an integer beyond every float
    raise UserError(f"{name} must be a number, got {quoted(value)}")


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise UserError(f"{name} must be an integer, got {quoted(value)}")


def _token_ids(values: Any) -> tuple[int, ...]:
    try:
        tokens = tuple(_integer("stop_token_ids", value) for value in values)
    except TypeError:
        raise UserError(f"stop_token_ids must be a sequence of token ids, got {quoted(values)}") from None
    for token in tokens:
        if not 0 <= token < TOKEN_LIMIT:
            raise UserError(f"stop_token_ids must lie in [0, 2**31), got {quoted(token)}")
    return tokens
