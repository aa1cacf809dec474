"""A backend that computes nothing: its tokens are a function of the prompt, and words in the prompt make it slow or fail.

    python -m tests.support.scripted --port 0

starts the real server on it, with the bundled model's tokenizer.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from megakernel.backend import Report, shared_length
from megakernel.engine import Engine
from megakernel.request import SamplingParams
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.errors import MachineError
from tests.support import BUNDLED
from tests.support.cli_fakes import bundled_tokenizer

CHUNK = 4  # tokens a launch
PAUSE = 0.001  # seconds a launch
FAULT, BROKEN, SLOW = "halfway fault", "broken engine", "slowly now"  # what a prompt says to get it
SLOW_PAUSE = 0.05
FAILING_PROBES = 1  # after BROKEN


def scripted_answer(prompt: Sequence[int], vocab_size: int, count: int) -> list[int]:
    """The first `count` tokens that follow a prompt; none of the special ones, which lie first."""
    source = random.Random(zlib.crc32(repr(list(prompt)).encode()))
    return [source.randrange(300, vocab_size) for _ in range(count)]


class ScriptedBackend:
    """See `megakernel.backend.Backend`.  `launches` counts calls of `decode`."""

    name = "scripted"

    def __init__(self, config: ModelConfig, capacity: int = 512, pause: float = PAUSE) -> None:
        self.config, self.capacity, self.pause = config, capacity, pause
        self.kept = self.launches = self.failing = 0
        self._tokenizer = bundled_tokenizer()
        self._held: list[int] = []

    def start(
        self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool = True, report: Report | None = None
    ) -> None:
        self.kept = shared_length(self._held, list(prompt)[:-1]) if reuse else 0
        text = self._tokenizer.decode(list(prompt))
        self.fault, self.broken, self.slow = (word in text for word in (FAULT, BROKEN, SLOW))
        self._held, self._place, self._limit, self._report = list(prompt), 0, limit, report
        self._answer = scripted_answer(prompt, self.config.vocab_size, limit)

    def decode(self, count: int) -> list[int]:
        self.launches += 1
        time.sleep(SLOW_PAUSE if self.slow else self.pause)
        if self.failing:
            self.failing -= 1
            raise MachineError("the GPU is not back yet")
        if (self.fault and self._place) or self.broken:
            self.failing = FAILING_PROBES if self.broken else 0
            raise MachineError("wait 17 of SM 3 expired")
        tokens = self._answer[self._place : self._place + count]
        self._place += len(tokens)
        self._held += tokens
        return tokens

    def logits(self) -> torch.Tensor:
        return torch.zeros(self.config.vocab_size)

    def close(self) -> None:
        self._held = []


def scripted_engine(capacity: int = 512, pause: float = PAUSE, chunk: int = CHUNK) -> Engine:
    """A real engine on it."""
    return Engine(ScriptedBackend(open_checkpoint(BUNDLED).config, capacity, pause), chunk)


def load(model: str, capacity: int | None = None, **_: Any) -> Engine:
    """Stands in for `load_engine`."""
    return scripted_engine(capacity or 512)


if __name__ == "__main__":
    from models.command import start
    from serving.command import main

    start(lambda: main(None, load))
