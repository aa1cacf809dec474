"""A backend that computes nothing: its tokens are a function of the prompt, and words in the prompt make it slow or fail.

    python -m tests.support.scripted --port 0

starts the real server on it, with the bundled model's tokenizer.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Sequence as Tokens
from typing import Any

import torch

from megakernel.backend import shared_length
from megakernel.engine import Engine
from megakernel.errors import NotNumbers
from megakernel.sequence import Sequence
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.errors import MachineError
from tests.support import BUNDLED
from tests.support.cli_fakes import bundled_tokenizer

CHUNK = 4  # tokens a launch
PAUSE = 0.001  # seconds a launch
FAULT, BROKEN, SLOW = "halfway fault", "broken engine", "slowly now"  # what a prompt says to get it
NUMBERLESS = "no numbers"  # likewise, after its first tokens
SLOW_PAUSE = 0.05
FAILING_PROBES = 1  # after BROKEN


def scripted_answer(prompt: Tokens[int], vocab_size: int, count: int) -> list[int]:
    """The first `count` tokens that follow a prompt; none of the special ones, which lie first."""
    source = random.Random(zlib.crc32(repr(list(prompt)).encode()))
    return [source.randrange(300, vocab_size) for _ in range(count)]


class ScriptedBackend:
    """See `megakernel.backend.Backend`.  `launches` counts calls of `decode`.  Sequences share the capacity; what one leaves
    behind is kept for the next."""

    name = "scripted"

    def __init__(self, config: ModelConfig, capacity: int = 512, pause: float = PAUSE, columns: int = 1) -> None:
        self.config, self.capacity, self.pause, self.columns = config, capacity, pause, columns
        self.launches = self.failing = 0
        self.answers: dict[Sequence, list[int]] = {}  # of those that have joined
        self._tokenizer = bundled_tokenizer()
        self._held: list[int] = []

    def join(self, sequence: Sequence) -> bool:
        rows = sum(one.rows for one in self.answers) + sequence.rows
        if len(self.answers) == self.columns or rows > self.capacity:
            return False
        sequence.kept = shared_length(self._held, sequence.prompt, len(sequence.prompt) - 1) if sequence.reuse else 0
        self.answers[sequence] = scripted_answer(sequence.prompt, self.config.vocab_size, sequence.limit)
        return True

    def leave(self, sequence: Sequence) -> None:
        if self.answers.pop(sequence, None) is not None:
            self._held = sequence.tokens

    def decode(self, count: int) -> None:
        self.launches += 1
        said = {one: self._tokenizer.decode(one.prompt) for one in self.answers if not one.ended}
        time.sleep(SLOW_PAUSE if any(SLOW in text for text in said.values()) else self.pause)
        if self.failing:
            self.failing -= 1
            raise MachineError("the GPU is not back yet")
        for sequence, text in said.items():
            if BROKEN in text or (FAULT in text and len(sequence.tokens) > len(sequence.prompt)):
                self.failing = FAILING_PROBES if BROKEN in text else 0
                raise MachineError("wait 17 of SM 3 expired")
        for sequence in said:
            place = len(sequence.tokens) - len(sequence.prompt)
            if NUMBERLESS in said[sequence] and place:
                sequence.fail(NotNumbers(len(sequence.tokens) - 1))
                continue
            sequence.take(self.answers[sequence][place : place + count])
            sequence.position = len(sequence.tokens) - 1

    def logits(self, sequence: Sequence) -> torch.Tensor:
        return torch.zeros(self.config.vocab_size)

    def close(self) -> None:
        self._held = []


def scripted_engine(capacity: int = 512, pause: float = PAUSE, chunk: int = CHUNK, columns: int = 1) -> Engine:
    """A real engine on it."""
    return Engine(ScriptedBackend(open_checkpoint(BUNDLED).config, capacity, pause, columns), chunk)


def load(model: str, capacity: int | None = None, **_: Any) -> Engine:
    """Stands in for `load_engine`."""
    return scripted_engine(capacity or 512, columns=8)


if __name__ == "__main__":
    from models.command import start
    from serving.command import main

    start(lambda: main(None, load))
