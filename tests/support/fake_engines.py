"""Engines for the tests of the comparison: they obey, lie, fail, hang or die, and compute nothing.

Loaded by name in a worker's process, as a user's own adapter is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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


class Together(Fake):
    """Takes several prompts, one token of each after the other."""

    def load(self, spec: LoadSpec) -> None:
        super().load(spec)
        self.batch = spec.batch

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        assert len(prompts) == self.batch and len({len(prompt) for prompt in prompts}) == 1
        return [[token for [token] in self.generate(prompt, tokens, False)] for prompt in prompts]


class MakesWeights(Fake):
    """Says of which preset it was to make weights."""

    makes_weights = True

    def load(self, spec: LoadSpec) -> None:
        super().load(spec)
        self.made_up = spec.made_up

    def settings(self) -> dict[str, str]:
        return {"weights": self.made_up}


class Configured(Fake):
    """Says what it was told to be."""

    def __init__(self, kind: str, level: int) -> None:
        self.told = {"kind": kind, "level": str(level)}

    def settings(self) -> dict[str, str]:
        return self.told


class Profiled(Fake):
    """Knows its kernels by name; the profiler that watches it is a fake as well."""

    written_in = "Triton"
    events = (
        ("aten::copy_", "CPU", 1.0),
        ("decode", "CUDA", 30.0),
        ("decode", "CUDA", 31.0),
        ("Memcpy DtoH (Device -> Pinned)", "CUDA", 2.0),
        ("void elementwise_kernel<4>(int)", "CUDA", 5.0),
    )

    def load(self, spec: LoadSpec) -> None:
        super().load(spec)
        self.generated: list[int] = []
        profiler = ModuleType("torch.profiler")
        profiler.profile = self.profile  # type: ignore[attr-defined]
        profiler.ProfilerActivity = SimpleNamespace(CPU="cpu", CUDA="cuda")  # type: ignore[attr-defined]
        torch = ModuleType("torch")
        torch.cuda = SimpleNamespace(synchronize=lambda: None)  # type: ignore[attr-defined]
        sys.modules |= {"torch": torch, "torch.profiler": profiler}

    @contextmanager
    def profile(self, activities: list[str]) -> Iterator[Any]:
        assert activities == ["cpu", "cuda"]
        self.generated.clear()
        yield SimpleNamespace(events=lambda: [fake_event(*event) for event in self.events])
        assert self.generated, "nothing was generated meanwhile"

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        for piece in super().generate(prompt, tokens, stream):
            self.generated += piece
            yield piece

    def kernel_names(self) -> Collection[str]:
        return {"decode", "prefill"}


def fake_event(name: str, device: str, microseconds: float, annotation: bool = False) -> Any:
    """What a profiler gives for one run of a kernel."""
    times = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=times, is_user_annotation=annotation)


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
