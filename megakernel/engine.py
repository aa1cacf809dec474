"""The engine: token ids in, token ids out, for as many sequences at once as its backend has columns.

It checks a request against the model and the capacity before anything is computed, lets it join the backend's others when there
is room, and gives a `Generation` for it.  It knows nothing of text, and a sequence stops only at the tokens that its request
names: whoever wants to end at the model's own end tokens passes `config.eos_token_ids`.
"""

from __future__ import annotations

import operator
from array import array
from collections import deque
from collections.abc import Sequence as Tokens
from contextlib import suppress

import numpy as np
import torch

from megakernel.backend import Backend
from megakernel.generation import Generation, Progress
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence
from models.config import ModelConfig
from models.errors import UserError, quoted

__all__ = ["Engine", "Generation", "SamplingParams"]

GREEDY = SamplingParams()


class Engine:
    """A loaded model and its requests.  Use it as a context manager, or call `close`.  Belongs to one thread.

    `chunk` is how many tokens of each sequence the backend decodes at a time: the tokens are the same for any number, a larger
    one saves launches and delays the first token.  `columns` sequences are decoded at once; those beyond, and those for which
    the cache has no room beside the others, wait their turn in the order in which they were asked for.
    """

    def __init__(self, backend: Backend, chunk: int = 1) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: decode at least 1 token at a time")
        self._backend: Backend | None = backend
        self._chunk = chunk
        self.config: ModelConfig = backend.config
        self.capacity: int = backend.capacity
        self.columns: int = backend.columns
        self.backend_name: str = backend.name
        self._joined: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: Tokens[int],
        max_tokens: int,
        sampling: SamplingParams = GREEDY,
        reuse: bool = True,
        progress: Progress | None = None,
    ) -> Generation:
        """Begin a request, beside those under way.  Raises UserError, with the numbers, for one that can never fit.

        reuse: compute only what follows the part of the prompt that the cache holds, of a request before or of one under way;
            `Generation.kept` then says how many tokens that part has.  Without it the tokens' bits depend on the request alone.
        progress: called while the generation waits for a long prompt, with the tokens read so far and the prompt's.
        """
        self._opened()
        ids = checked_prompt(prompt, self.config.vocab_size)
        check_length(len(ids), max_tokens, self.capacity)
        sequence = Sequence(ids, max_tokens, sampling, reuse)
        generation = Generation(self, sequence, progress)
        self._waiting.append(sequence)
        self.settle()
        return generation

    def step(self) -> None:
        """Wait for the backend once; what came is with its generations, and so is what went wrong.  Does nothing without any.

        An interrupt abandons all that were being decoded.
        """
        self.settle()
        if not self._joined:
            return
        known = self._known()
        try:
            self._opened().decode(self._chunk)
            if known == self._known():
                raise RuntimeError(f"the {self.backend_name} backend has decoded nothing, and no sequence has ended")
        except Exception as error:
            self._lose(error)
        except BaseException:
            self._lose(None)
            raise

    def _known(self) -> list[tuple[int, int, bool]]:
        """What changes when any sequence is moved on."""
        return [(len(sequence.tokens), sequence.position, sequence.abandoned) for sequence in self._joined]

    def settle(self) -> None:
        """Let those leave the backend that have ended, and those join it that wait, as far as there is room."""
        backend = self._opened()
        try:
            for sequence in tuple(self._joined):
                if sequence.finish is not None or sequence.abandoned:
                    backend.leave(sequence)
                    self._joined.remove(sequence)
            while self._waiting:
                if not self._waiting[0].ended and not self._join(backend, self._waiting[0]):
                    break
                self._waiting.popleft()
        except BaseException:
            self._lose(None)
            raise

    def _join(self, backend: Backend, sequence: Sequence) -> bool:
        """Whether a sequence waits no longer; one that cannot even begin has ended."""
        self._joined.append(sequence)  # first: whatever becomes of this, it will leave
        try:
            joined = backend.join(sequence)
        except Exception as error:
            sequence.fail(error)
            return True
        if not joined:
            self._joined.pop()
            if not self._joined:
                raise RuntimeError(f"the {self.backend_name} backend has no room for a sequence and decodes none")
        return joined

    def _lose(self, error: Exception | None) -> None:
        """End all that the backend decodes."""
        for sequence in self._joined:
            sequence.fail(error)

    def waits(self, sequence: Sequence) -> bool:
        """Whether a sequence has not joined the backend yet."""
        return sequence in self._waiting

    def logits(self, sequence: Sequence) -> torch.Tensor:
        """See `Generation.logits`."""
        return self._opened().logits(sequence)

    def close(self) -> None:
        """Give back the backend's memory; what is under way is abandoned.  May be called twice."""
        for sequence in (*self._joined, *self._waiting):
            sequence.abandon()
        self._joined.clear()
        self._waiting.clear()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _opened(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("the engine is closed")
        return self._backend


def checked_prompt(prompt: Tokens[int], vocab_size: int) -> list[int]:
    """The prompt as a list of its own; raises UserError for an empty one and for ids outside the vocabulary."""
    if not len(prompt):
        raise UserError("the prompt is empty: give at least one token")
    if isinstance(prompt, list):
        with suppress(TypeError, OverflowError):  # hardly ever, so a long prompt shall not take a millisecond
            if np.frombuffer(array("I", prompt), np.uint32).max() < vocab_size:
                return prompt.copy()
    ids = []
    for place, token in enumerate(prompt):
        try:
            ids.append(operator.index(token))
        except TypeError:
            raise UserError(f"prompt token {place} is {quoted(token)}: token ids are integers") from None
        if not 0 <= ids[-1] < vocab_size:
            raise UserError(f"prompt token {place} is {quoted(token)}: this model's token ids go from 0 to {vocab_size - 1}")
    return ids


def check_length(prompt: int, max_tokens: int, capacity: int) -> None:
    """Refuse a request that the KV cache cannot hold; raises UserError with the numbers."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise UserError(f"max_tokens is {quoted(max_tokens)}: ask for at least 1 token")
    if prompt >= capacity:
        raise UserError(
            f"the prompt has {prompt} tokens and the context holds {capacity}: "
            f"shorten it by at least {prompt + 1 - capacity}, or load the model with a larger capacity"
        )
    if prompt + max_tokens > capacity:
        raise UserError(
            f"a prompt of {prompt} tokens and {quoted(max_tokens)} more do not fit the context of {capacity}: "
            f"ask for at most {capacity - prompt} tokens, or load the model with a larger capacity"
        )
