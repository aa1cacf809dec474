"""What the comparison asks of an engine: load, generate, and if it can, say how likely every next token was.

A subclass is imported in its engine's own process and Python, which may hold nothing of this project's dependencies: this
module and the subclass at import time use the standard library alone, heavier imports stand inside the methods.  An adapter
never measures anything; whoever drives it does (`bench.compare.worker`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class LoadSpec:
    """What every engine is told alike.

    model: absolute path of a Hugging Face checkpoint directory.
    capacity: most tokens of a sequence, prompt and generated ones, that will be asked for.
    kv_bytes: bytes of K and V that one token leaves in a bf16 cache, for engines that size their cache in bytes.
    batch: how many sequences, of one length each time, are decoded together.
    made_up: "random:<preset>" where `model` holds a config.json and no weights: the engine is to make up its own.
    """

    model: str
    capacity: int
    kv_bytes: int
    batch: int = 1
    made_up: str = ""


class Adapter:
    """One engine with its own best settings for the batch size.  Any exception fails the engine and is reported."""

    streaming = "never"  # "always": generate yields tokens as they come; "asked": only if stream is true
    scoring = ""  # the path that `distribution` takes through the engine, in a few words; "": there is none
    makes_weights = False  # whether it can make up weights for a configuration
    written_in = ""  # the language of the engine's own kernels, where it knows them by name; "": it does not

    def load(self, spec: LoadSpec) -> None:
        """Make the engine ready to generate."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """What was chosen for this batch size, by name, as the report lists it.  Called after `load`."""
        raise NotImplementedError

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        """Exactly `tokens` greedy token ids after the prompt, stop tokens ignored, no work of an earlier call reused.

        Yields what has reached the host, in one piece or in several.
        """
        raise NotImplementedError

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """As `generate`, for as many prompts of one length as `LoadSpec.batch` says: the tokens of each."""
        raise NotImplementedError("its adapter decodes one prompt at a time")

    def kernel_names(self) -> Collection[str]:
        """The functions that its own kernels are compiled from, for engines with `written_in`.  Called after `generate`."""
        raise NotImplementedError

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        """Logits or log-probabilities of the token after `prefix`, before any sampling: fp32 [vocabulary]."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back the GPU."""
