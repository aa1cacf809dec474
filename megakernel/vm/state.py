"""What outlives a launch and is shared by the programs of all context buckets: the sequence and its KV cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from instructions.base import GREEDY, SamplingState
from instructions.shape import Shape
from megakernel.vm.errors import Fault
from megakernel.vm.memory import KvCache


class DecodeState:
    """One sequence.  `tokens` are the prompt and what was generated so far; `position` counts the tokens decoded.
    `hidden`, fp32 [hidden_size], is what prefill would have left for a program that begins with the last layer.

    Only what depends on neither bucket nor slices is used of the shape, so that all programs of a model can share it.
    """

    def __init__(self, shape: Shape) -> None:
        self.cache = KvCache(shape)
        self.capacity = shape.capacity
        self.vocab_size = shape.config.vocab_size
        self.tokens: list[int] = []
        self.prompt_length = 0
        self.position = 0
        self.sampling = GREEDY
        self.stop_tokens: frozenset[int] = frozenset()
        self.stopped = False
        self.hidden: torch.Tensor | None = None

    def start(
        self, prompt: Sequence[int], sampling: SamplingState = GREEDY, stop_tokens: Collection[int] = frozenset()
    ) -> None:
        """Begin a new sequence with a prompt of at least one token, forgetting the one before."""
        self.cache.clear()
        self.tokens, self.prompt_length, self.position = list(prompt), len(prompt), 0
        self.sampling, self.stop_tokens, self.stopped = sampling, frozenset(stop_tokens), False
        self.hidden = None

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    def token(self, position: int) -> int:
        """The token at a position, which must be known."""
        if position >= len(self.tokens):
            raise Fault(f"reads the token at position {position}, but only {len(self.tokens)} are known")
        return self.tokens[position]

    def emit(self, position: int, token: int) -> None:
        """Store the token that follows `position`; within the prompt the prompt's own token stands."""
        if position != self.position:
            raise Fault(f"chooses the token after position {position}, but {self.position} positions are decoded")
        if not 0 <= token < self.vocab_size:
            raise Fault(f"chooses token {token} of a vocabulary of {self.vocab_size}")
        self.position += 1
        if self.position >= self.prompt_length:
            self.tokens.append(token)
            self.stopped = token in self.stop_tokens
