"""What the engine asks of a backend: one sequence at a time, decoded on some machine.  It knows neither text nor limits: the
engine has checked every number before it comes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from instructions.base import SamplingState
from megakernel.request import SamplingParams
from models.config import ModelConfig

Report = Callable[[int], None]  # is told how many positions of a prompt have been read


class Backend(Protocol):
    """A loaded model.  `capacity` is the most tokens, prompt and generated ones together, of a sequence; `kept` how many
    positions of the last prompt were in the KV cache when its request began."""

    name: str
    config: ModelConfig
    capacity: int
    kept: int

    def start(
        self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool = True, report: Report | None = None
    ) -> None:
        """Begin a new sequence of at most `limit` generated tokens.  Computes nothing yet.

        With `reuse`, what the KV cache holds of the sequence before may serve for as long as the prompt begins like it;
        otherwise that is forgotten.  `report` is called while a long prompt is read.
        """

    def decode(self, count: int) -> list[int]:
        """The next `count` generated tokens, which the engine never asks for beyond `limit`.

        Fewer, but at least one, when a stop token comes: it is the last of them.  Not called again after that.
        """

    def logits(self) -> torch.Tensor:
        """What the last token was chosen from, fp32 [vocab_size], on the host; asked for when nothing is under way."""

    def close(self) -> None:
        """Give back memory and device; the backend is of no use afterwards."""


def sampling_state(sampling: SamplingParams) -> SamplingState:
    """What of a request's sampling a machine is told, beside its stop tokens."""
    return SamplingState(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)


def shared_length(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common from their beginning: halves are compared whole, which is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
