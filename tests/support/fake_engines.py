"""Engines for the tests of the comparison: they obey, lie, fail, hang or die, and compute nothing.

Loaded by name in a worker's process, as a user's own adapter is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.compare.adapter import Adapter, LoadSpec

VOCABULARY = 96  # of the checkpoint "mha" in `configs`
TOKEN_SECONDS = 0.02  # well above a busy machine's noise: a longer generation always takes longer


class Fake(Adapter):
    """Counts up from the last token of the prompt, a token every TOKEN_SECONDS."""

    streaming = "always"
    scoring = "made up"

    def load(self, spec: LoadSpec) -> None:
        assert os.path.isdir(spec.model) and spec.kv_bytes > 0
        print("an engine prints what it likes")
        self.capacity = spec.capacity

    def settings(self) -> dict[str, str]:
        return {"kind": "fake"}

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        assert len(prompt) + tokens <= self.capacity
        for offset in range(tokens):
            time.sleep(TOKEN_SECONDS)
            yield [(prompt[-1] + 1 + offset) % VOCABULARY]

    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        return np.full(VOCABULARY + 8, 0.25, dtype=np.float32)  # padded, as engines do


class Whole(Fake):
    """Gives its tokens in one piece, and in several when asked."""

    streaming = "asked"

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        pieces = list(super().generate(prompt, tokens, stream))
        yield from pieces if stream else [[token for piece in pieces for token in piece]]


class Silent(Whole):
    streaming = "never"
    scoring = ""


class Short(Fake):
    """One token too few."""

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        yield from super().generate(prompt, tokens - 1, stream)


class Broken(Fake):
    def load(self, spec: LoadSpec) -> None:
        raise RuntimeError("no kernel image\nfor this device")


class NotANumber(Fake):
    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        return np.full(VOCABULARY, np.nan, dtype=np.float32)


class Hanging(Fake):
    """Starts a process of its own, notes its number beside the model, and waits for ever."""

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        Path(os.environ["FAKE_CHILD"]).write_text(str(child.pid))
        time.sleep(1000)
        yield []


class Dying(Fake):
    """Ends without a word after its start, and leaves a child that holds its pipes."""

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(9)
        yield []
