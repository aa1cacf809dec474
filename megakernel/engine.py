"""The engine: token ids in, token ids out, one sequence at a time.

It checks a request against the model and the capacity before anything is computed, hands it to a backend, and counts.  It
knows nothing of text, and it stops only at the tokens that the request names: whoever wants to end at the model's own end
tokens passes `config.eos_token_ids`.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from megakernel.backend import Backend
from megakernel.request import SamplingParams
from models.config import ModelConfig
from models.errors import UserError, quoted

__all__ = ["Engine", "SamplingParams"]

GREEDY = SamplingParams()
Progress = Callable[[int, int], None]


class Engine:
    """A loaded model and at most one request.  Use it as a context manager, or call `close`.

    `chunk` is how many tokens the backend decodes at a time: the tokens are the same for any number, a larger one saves
    launches and delays the first token.
    """

    def __init__(self, backend: Backend, chunk: int = 1) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}: decode at least 1 token at a time")
        self._backend: Backend | None = backend
        self._chunk = chunk
        self.config: ModelConfig = backend.config
        self.capacity: int = backend.capacity
        self.backend_name: str = backend.name
        self.finish_reason: str | None = None
        self.kept = 0  # positions of the request's prompt whose keys and values were in the cache when it began
        self._limit = 0  # tokens still to hand out; 0: no request
        self._stops: frozenset[int] = frozenset()
        self._ready: deque[int] = deque()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams = GREEDY,
        reuse: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Begin a request, abandoning an unfinished one.  Raises UserError, with the numbers, for one that does not fit.

        reuse: compute only what follows the part of the prompt that the cache holds from the request before, where the backend
            can; `kept` then says how many tokens that part has.  Without it the first tokens' bits depend on the prompt alone.
        progress: called while a long prompt is read, with the tokens read so far and the prompt's.
        """
        backend = self._opened()
        ids = checked_prompt(prompt, self.config.vocab_size)
        check_length(len(ids), max_tokens, self.capacity)
        self.stop()
        report = None if progress is None else lambda done: progress(done, len(ids))
        backend.start(ids, max_tokens, sampling, reuse, report)
        self.kept, self.finish_reason = backend.kept, None
        self._limit, self._stops = max_tokens, frozenset(sampling.stop_token_ids)

    def step(self) -> int | None:
        """The next token id, a stop token included; None when the request is finished or was abandoned."""
        tokens = self._next(1)
        return tokens[0] if tokens else None

    def steps(self) -> list[int]:
        """All token ids that can be had by waiting for the backend once, at least one; [] where `step` returns None."""
        return self._next(self._chunk)

    def _next(self, most: int) -> list[int]:
        backend = self._opened()
        if not self._limit:
            return []
        if not self._ready:
            self._ready.extend(self._decoded(backend))
        tokens = [self._ready.popleft() for _ in range(min(most, self._limit, len(self._ready)))]
        end = next((place for place, token in enumerate(tokens, 1) if token in self._stops), None)
        self._limit -= len(tokens)
        if end is not None:
            self.finish_reason, tokens = "stop", tokens[:end]
        elif not self._limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._limit = 0
            self._ready.clear()
        return tokens

    def stream(self) -> Iterator[int]:
        """All token ids still to come, one by one; the same as calling `step` until it returns None."""
        while (token := self.step()) is not None:
            yield token

    def logits(self) -> torch.Tensor:
        """What the last token of a finished request was chosen from: fp32 [vocab_size], on the host."""
        backend = self._opened()
        if self.finish_reason is None:
            raise RuntimeError("logits are there once a request is finished")
        return backend.logits()

    @property
    def steps_made(self) -> int | None:
        """How many steps of the request there were in which tokens were chosen, where the backend drafts; more tokens than
        steps are drafts' worth."""
        return getattr(self._opened(), "steps", None)

    def stop(self) -> None:
        """Abandon the request; the engine stays usable.  Without one it does nothing."""
        self._limit = 0
        self._ready.clear()

    def close(self) -> None:
        """Give back the backend's memory.  May be called twice."""
        self.stop()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _opened(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("the engine is closed")
        return self._backend

    def _decoded(self, backend: Backend) -> list[int]:
        """Ask the backend for tokens; an error ends the request."""
        try:
            tokens = backend.decode(min(self._chunk, self._limit))
        except BaseException:
            self.stop()
            raise
        if not tokens:
            self.stop()
            raise RuntimeError(f"the {self.backend_name} backend ended a sequence without a stop token")
        return tokens


def checked_prompt(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """The prompt as plain integers; raises UserError for an empty one and for ids outside the vocabulary."""
    if not len(prompt):
        raise UserError("the prompt is empty: give at least one token")
    if isinstance(prompt, list) and set(map(type, prompt)) == {int} and 0 <= min(prompt) <= max(prompt) < vocab_size:
        return list(prompt)  # as good as always, and then a long prompt shall not take a millisecond
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
