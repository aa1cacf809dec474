"""A sequence: all that is known of one request while it is decoded, whatever backend decodes it.

The engine makes it, the backend that it joins moves it on (`position`, `take`, `fail`), and a `Generation` hands out what came.
A sequence ends with its limit, with a stop token, with an error, or because nobody wants it any more.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from megakernel.request import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A prompt of at least one token, and at most `limit` tokens to follow it.

    reuse: what the KV cache holds of a beginning of the prompt may serve.
    tokens: the prompt and what has been chosen since; `ready` what of it nobody has taken yet.
    position: its first positions, whose keys and values are in its part of the cache; `kept` of them were there when it joined.
    steps: steps of the backend in which its tokens were chosen, where that counts them.
    part: the blocks of the cache that are its own or that it shares, where the backend's cache has parts.
    error: what ended it, to be raised once for whoever takes its tokens.
    first, last: when its first and its newest tokens came, by time.perf_counter; 0 before.
    """

    prompt: list[int]
    limit: int
    sampling: SamplingParams
    reuse: bool = True
    tokens: list[int] = field(init=False)
    ready: deque[int] = field(default_factory=deque, init=False)
    position: int = field(default=0, init=False)
    steps: int = field(default=0, init=False)
    kept: int = field(default=0, init=False)
    part: list[int] = field(default_factory=list, init=False)
    finish: str | None = field(default=None, init=False)  # "stop" or "length"
    error: Exception | None = field(default=None, init=False)
    abandoned: bool = field(default=False, init=False)
    first: float = field(default=0.0, init=False)
    last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self._stops = frozenset(self.sampling.stop_token_ids)
        self._end = len(self.prompt) + self.limit

    @property
    def left(self) -> int:
        """How many tokens are still to be chosen at most."""
        return self._end - len(self.tokens)

    @property
    def ended(self) -> bool:
        """Whether it needs its backend no longer."""
        return self.finish is not None or self.abandoned

    @property
    def rows(self) -> int:
        """Positions of the cache that it takes at most: its last token is never read."""
        return self._end - 1

    def take(self, tokens: list[int]) -> None:
        """Add tokens that were chosen; those beyond the limit or behind a stop token are dropped."""
        if not tokens:
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        left, finish = self._end - len(self.tokens), None
        if len(tokens) >= left:
            tokens, finish = tokens[:left], "length"
        if not self._stops.isdisjoint(tokens):
            place = next(place for place, token in enumerate(tokens, 1) if token in self._stops)
            tokens, finish = tokens[:place], "stop"
        self.tokens += tokens
        self.ready += tokens
        self.finish = finish

    def fail(self, error: Exception | None) -> None:
        """End it with an error, or without a word, unless it has ended."""
        if not self.ended:
            self.error, self.abandoned = error, True

    def abandon(self) -> None:
        """Nobody wants it any more: what is ready is forgotten.  May be called by any thread."""
        self.abandoned = True
        self.ready.clear()
