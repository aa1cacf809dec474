"""This project, through the engine that its users load and call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec

if TYPE_CHECKING:
    import numpy


class Megakernel(Adapter):
    """`load_engine` with its defaults; only the capacity is given, as to every engine."""

    streaming = "always"
    scoring = "decode steps"
    engine: Any

    def load(self, spec: LoadSpec) -> None:
        import torch

        from megakernel.loading import load_engine

        self.backend = "gpu" if torch.cuda.is_available() else "auto"  # on a GPU machine never the CPU's in its place
        self.engine = load_engine(spec.model, backend=self.backend, capacity=spec.capacity)

    def settings(self) -> dict[str, str]:
        call = f"load_engine(model, backend={self.backend!r}, capacity={self.engine.capacity})"
        return {"call": call, "backend": self.engine.backend_name}

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        for token in self.engine.generate(prompt, tokens, reuse=False):  # the same prompt over and over is to be read anew
            yield [token]

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        generation = self.engine.generate(prefix, 1, reuse=False)
        next(generation)
        return generation.logits().numpy()

    def close(self) -> None:
        self.engine.close()
