"""What a comparison is to do, and its patience.  Everything here is the same for every engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bench.compare.adapter import LoadSpec
from bench.compare.prompts import Prompts
from models.config import ModelConfig
from models.weights import expert_size, parameter_count

BF16 = 2  # bytes
CAPACITY_STEP = 128
SPARE_POSITIONS = 64  # some engines keep a few positions of a sequence for themselves


@dataclass(frozen=True)
class Plan:
    """Timeouts and the time limit are in seconds; `scored_tokens` positions are judged after each scored prompt.

    `batch` prompts of each context are decoded together; they stand one behind the other in `prompts.timed`.  `made_up` is
    "random:<preset>" where `model` holds its configuration alone.
    """

    model: Path
    config: ModelConfig
    prompts: Prompts
    contexts: tuple[int, ...] = (32, 512, 4096)
    tokens: int = 128
    batch: int = 1
    repeats: int = 5
    scored_tokens: int = 32
    seed: int = 0
    start_timeout: float = 420.0
    timeout: float = 120.0
    time_limit: float | None = None
    made_up: str = ""
    commit: str | None = None  # the one measured, where git cannot tell

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one token leaves in a bf16 cache."""
        return 2 * BF16 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim

    @property
    def weight_bytes(self) -> int:
        """Bytes of bf16 weights that one decode step must read: all but an embedding that is not also the head, and of experts
        as many as a token takes."""
        config = self.config
        embedding = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
        idle = config.num_experts - config.experts_per_token
        experts = config.num_layers * idle * expert_size(config) if idle else 0
        return BF16 * (parameter_count(config) - embedding - experts)

    def step_bytes(self, context: int) -> int:
        """Bytes that a decode step must read, on average over the measured tokens after prompts so long."""
        return self.weight_bytes + self.batch * int(self.kv_bytes * (context + self.tokens / 2))

    def together(self, place: int) -> tuple[tuple[int, ...], ...]:
        """The prompts of the context at this place that are decoded together."""
        return self.prompts.timed[place * self.batch : (place + 1) * self.batch]

    @property
    def load_spec(self) -> LoadSpec:
        longest = max([*self.contexts, *(len(prompt) for prompt in self.prompts.scored)])
        wanted = longest + max(self.tokens, self.scored_tokens) + SPARE_POSITIONS
        capacity = min(-(-wanted // CAPACITY_STEP) * CAPACITY_STEP, self.config.max_position)
        return LoadSpec(str(self.model), capacity, self.kv_bytes, self.batch, self.made_up)


class Deadline:
    """How much time is left."""

    def __init__(self, limit: float | None) -> None:
        self.end = None if limit is None else time.monotonic() + limit

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()

    def within(self, seconds: float) -> float:
        """So many seconds, or what is left of them."""
        return max(1.0, min(seconds, self.left()))
