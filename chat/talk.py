"""What answers: the engine, asked with a whole conversation, whose beginning it still holds."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chat.conversation import Conversation
from megakernel.request import SEED_LIMIT, SamplingParams

if TYPE_CHECKING:
    from megakernel.engine import Engine
    from megakernel.text import TextCodec


@dataclass
class Stats:
    """Of one answer, or of all: tokens of prompts and those of them that were kept, tokens generated; seconds to first tokens,
    and of the tokens after them."""

    answers: int = 0
    prompt: int = 0
    kept: int = 0
    tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, other: Stats) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def line(self) -> str:
        """In words."""
        parts = [f"{self.tokens} tokens"]
        if self.tokens > self.answers and self.seconds > 0:
            parts.append(f"{(self.tokens - self.answers) / self.seconds:.1f} tokens/s")
        if self.answers:
            parts.append(f"first after {1000 * self.first_seconds / self.answers:.1f} ms")
        if self.kept:
            parts.append(f"{self.kept:,} of {self.prompt:,} prompt tokens kept")
        return ", ".join(parts)


class Talk:
    """One engine and its conversation's answers.  `last` and `total` count them."""

    def __init__(self, engine: Engine, text: TextCodec, sampling: SamplingParams, max_tokens: int | None) -> None:
        self._engine, self._text, self._max_tokens = engine, text, max_tokens
        self._sampling = replace(sampling, stop_token_ids=tuple(engine.config.eos_token_ids))
        self.last, self.total = Stats(), Stats()

    @property
    def capacity(self) -> int:
        return self._engine.capacity

    def prompt_of(self, conversation: Conversation) -> list[int]:
        """The tokens that the model is asked with."""
        return self._text.encode_messages(conversation.messages)

    def answer(self, conversation: Conversation) -> Generator[str, None, None]:
        """The pieces of the next turn, which the caller adds to the conversation.  Raises UserError where it does not fit; may
        be left at any piece."""
        prompt = self.prompt_of(conversation)
        room = max(1, self._engine.capacity - len(prompt))
        most = room if self._max_tokens is None else min(room, self._max_tokens)
        # Each answer has draws of its own, and the whole conversation those of its seed.
        sampling = replace(self._sampling, seed=(self._sampling.seed + self.total.answers) % SEED_LIMIT)
        self.last, began = Stats(), time.perf_counter()
        generation, detokenizer = self._engine.generate(prompt, most, sampling), self._text.detokenizer(prompt)
        try:
            while tokens := generation.steps():
                first, newest = generation.times
                self.last.answers, self.last.tokens = 1, self.last.tokens + len(tokens)
                self.last.prompt, self.last.kept = len(prompt), generation.kept
                self.last.first_seconds, self.last.seconds = first - began, newest - first
                ended = generation.finish_reason == "stop"
                yield detokenizer.steps(tokens[:-1] if ended else tokens)
            yield detokenizer.finish()
        finally:
            generation.stop()
            self.total.add(self.last)
