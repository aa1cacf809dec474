"""What the engine asks of a backend: some sequences at once, decoded on some machine.  It knows neither text nor limits: the
engine has checked every number before it comes here."""

from __future__ import annotations

from typing import Protocol

import torch

from instructions.base import SamplingState
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence
from models.config import ModelConfig


class Backend(Protocol):
    """A loaded model.  `columns` sequences at most are decoded at once; `capacity` is the most tokens of a sequence, prompt and
    generated ones together, and of all sequences where they share a cache."""

    name: str
    config: ModelConfig
    capacity: int
    columns: int

    def join(self, sequence: Sequence) -> bool:
        """Take in a sequence, and say in `kept` and `position` what the cache holds of its prompt.  Decodes nothing yet.

        False, and nothing has changed, where it must wait until another leaves: for a column, or for rows of the cache.
        """

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go, whether it has ended or not; does nothing for one that has not joined.  Must be quick: what is
        under way for it may go on.  Later sequences may use what the cache holds of it."""

    def decode(self, count: int) -> None:
        """Move the sequences that have joined on, as far as one wait for the device brings them: those that have not ended are
        given tokens (`Sequence.take`), some `count`, or a piece of their prompt is read (`Sequence.position`); at least one is
        moved on.

        What ends a sequence alone is told it (`Sequence.fail`).  Raises what ends all of them.
        """

    def logits(self, sequence: Sequence) -> torch.Tensor:
        """What the last token was chosen from, fp32 [vocab_size], on the host; of a sequence that has ended and not left."""

    def close(self) -> None:
        """Give back memory and device; the backend is of no use afterwards."""


def sampling_state(sampling: SamplingParams) -> SamplingState:
    """What of a request's sampling a machine is told, beside its stop tokens."""
    return SamplingState(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)


def shared_length(one: list[int], other: list[int], most: int | None = None) -> int:
    """How many tokens, `most` at most, two sequences have in common from their beginning: pieces are compared whole, which is
    fast, and first of all everything."""
    low, high = 0, min(len(one), len(other), len(one) if most is None else most)
    if one[:1] != other[:1]:  # most often so
        return 0
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
