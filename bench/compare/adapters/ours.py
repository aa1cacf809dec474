"""This project, through the engine that its users load and call."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec

if TYPE_CHECKING:
    import numpy

PACKAGE = "megakernel"  # whose modules hold the kernels


class Megakernel(Adapter):
    """`load_engine` with its defaults; only the capacity is given, as to every engine, and what makes it this row."""

    streaming = "always"
    scoring = "decode steps"
    makes_weights = True
    engine: Any

    def __init__(self, **options: Any) -> None:
        """options: further arguments of `load_engine`, such as the format of the weights."""
        self.options = options

    def load(self, spec: LoadSpec) -> None:
        import torch

        from megakernel.control_block import MOST_SEQUENCES
        from megakernel.loading import load_engine
        from models.checkpoint import open_checkpoint

        capacity, sequences = spec.capacity, None
        if torch.cuda.is_available():
            self.backend, self.written_in = "gpu", "Triton"  # on a GPU machine never the CPU's in its place
            sequences = min(spec.batch, MOST_SEQUENCES)
        else:  # where sequences share the capacity
            self.backend = "auto"
            capacity = min(spec.batch * spec.capacity, open_checkpoint(spec.made_up or spec.model).config.max_position)
        options = {"backend": self.backend, "capacity": capacity, "sequences": sequences, **self.options}
        self.engine = load_engine(spec.made_up or spec.model, **options)

    def settings(self) -> dict[str, str]:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        call = f"load_engine(model, backend={self.backend!r}, capacity={self.engine.capacity}{options})"
        return {"call": call, "backend": self.engine.backend_name, "sequences at once": str(self.engine.columns)}

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        for token in self.engine.generate(prompt, tokens, reuse=False):  # the same prompt over and over is to be read anew
            yield [token]

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        generations = [self.engine.generate(prompt, tokens, reuse=False) for prompt in prompts]  # some may wait for others
        return [list(generation) for generation in generations]

    def kernel_names(self) -> Collection[str]:
        from triton.runtime.jit import JITFunction

        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE]
        functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
        return {function.__name__ for function in functions if function.__module__.split(".")[0] == PACKAGE}

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        generation = self.engine.generate(prefix, 1, reuse=False)
        next(generation)
        return generation.logits().numpy()

    def close(self) -> None:
        self.engine.close()
