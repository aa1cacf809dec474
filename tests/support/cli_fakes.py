"""An engine that says what it is told to, for tests of the command line that need no model to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from megakernel.request import SamplingParams
from models.errors import UserError
from tests.support import BUNDLED

if TYPE_CHECKING:
    from megakernel.engine import Engine

EOS = 1  # <|end|> of the bundled tokenizer


class FakeEngine:
    """Gives `tokens` and ends: with "stop" after EOS, else with "length"; raises KeyboardInterrupt at `interrupt_at`."""

    def __init__(self, tokens: Sequence[int], interrupt_at: int | None = None, pause: float = 0.0) -> None:
        self.tokens, self.interrupt_at, self.pause = list(tokens), interrupt_at, pause
        self.config = SimpleNamespace(eos_token_ids=(EOS,))
        self.capacity, self.backend_name = 512, "vm"
        self.started: tuple[list[int], int, SamplingParams] | None = None
        self.stopped = self.closed = False
        self.kept = 0
        self.steps_made = 2  # as if drafts had been right
        self.chunk = 4096  # tokens of the prompt that are read at one go
        self.generation = FakeGeneration

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: Sequence[int], max_tokens: int, sampling: SamplingParams, progress: Callable[[int, int], None]
    ) -> FakeGeneration:
        if len(prompt) + max_tokens > self.capacity:
            raise UserError(f"{len(prompt)} prompt tokens and {max_tokens} more exceed the capacity of {self.capacity}")
        self.started = (list(prompt), max_tokens, sampling)
        return self.generation(self, progress)

    def close(self) -> None:
        self.closed = True


class FakeGeneration:
    """What comes of the engine's one request."""

    def __init__(self, engine: FakeEngine, progress: Callable[[int, int], None]) -> None:
        self.engine, self.progress, self.kept = engine, progress, engine.kept
        self.steps_made = engine.steps_made
        self.finish_reason: str | None = None

    def __iter__(self) -> Iterator[int]:
        engine = self.engine
        assert engine.started is not None
        prompt, max_tokens, sampling = engine.started
        for done in range(engine.chunk, len(prompt), engine.chunk):
            self.progress(done, len(prompt))
        for index, token in enumerate(engine.tokens[:max_tokens]):
            if index == engine.interrupt_at:
                raise KeyboardInterrupt
            time.sleep(engine.pause)
            yield token
            if token in sampling.stop_token_ids:
                self.finish_reason = "stop"
                return
        self.finish_reason = "length"

    def stop(self) -> None:
        self.engine.stopped = True


class Loader:
    """In place of `load_engine`: hands out one engine and remembers how it was asked for."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.asked: dict[str, Any] = {}

    def __call__(
        self, model: str, *, progress: Callable[[int, int], None], checkpoint: object, stage: object, **asked: Any
    ) -> Engine:
        self.asked = {"model": model, **asked}
        for done in range(3):
            progress(done, 2)
        return cast("Engine", self.engine)


def bundled_tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def ids_of(text: str) -> list[int]:
    """Token ids of a text, without BOS."""
    return list(bundled_tokenizer().encode(text, add_special_tokens=False).ids)
