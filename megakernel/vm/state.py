"""What outlives a launch and is shared by the programs of all context buckets: the sequences and their KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from instructions.base import GREEDY, SamplingState
from instructions.drafts import look_up
from instructions.shape import Shape
from megakernel.vm.errors import Fault
from megakernel.vm.memory import KvCache

Source = Callable[[Sequence[int], int], list[int]]  # of drafts: the tokens so far, and the most that are wanted


class SequenceState:
    """One sequence.  `tokens` are the prompt and what was generated so far; `position` counts the tokens decoded.  `end` is the
    first position that must not be decoded.  `drafts` may be right: the tokens after the last known one, from `source`."""

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.vocab_size, self.capacity = vocab_size, capacity
        self.tokens: list[int] = []
        self.prompt_length = self.position = self.end = 0
        self.sampling = GREEDY
        self.stop_tokens: frozenset[int] = frozenset()
        self.stopped = False
        self.drafts: list[int] = []
        self.source: Source = look_up
        self.slices = 0  # of attention at its positions, were it alone; 0: the program's
        self.last_place = 0  # of the column that chose the last token

    def begin(self, prompt: Sequence[int], sampling: SamplingState, stop_tokens: Collection[int]) -> None:
        """A new sequence in the place of the one before."""
        self.tokens, self.prompt_length, self.position = list(prompt), len(prompt), 0
        self.sampling, self.stop_tokens, self.stopped = sampling, frozenset(stop_tokens), False
        self.end, self.drafts, self.last_place = self.capacity, [], 0

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    def token(self, position: int) -> int:
        """The token at a position, which must be known."""
        if position >= len(self.tokens):
            raise Fault(f"reads the token at position {position}, but only {len(self.tokens)} are known")
        return self.tokens[position]

    def runs(self, limit: int) -> bool:
        """Whether there is a position left to decode, below a limit."""
        return not self.stopped and self.position < min(self.end, limit)

    def coming(self) -> list[int]:
        """The token to be decoded next, and those that may follow it: the prompt's own, or drafts."""
        return self.tokens[self.position :] + self.drafts

    def emit(self, position: int, token: int) -> None:
        """Store the token that follows `position`; within the prompt the prompt's own token stands."""
        if position != self.position:
            raise Fault(f"chooses the token after position {position}, but {self.position} positions are decoded")
        if not 0 <= token < self.vocab_size:
            raise Fault(f"chooses token {token} of a vocabulary of {self.vocab_size}")
        self.position += 1
        if self.position >= self.prompt_length:
            self.tokens.append(token)
            self.stopped = token in self.stop_tokens

    def accept(self, chosen: Sequence[int]) -> None:
        """Store what a step has chosen after each of the tokens that it decoded: the first, and each after a token that is the
        very one chosen before it.  Ends with a stop token."""
        coming = self.coming()
        for place, token in enumerate(chosen):
            self.emit(self.position, token)
            self.last_place = place
            if self.stopped or place + 1 == len(chosen) or coming[place + 1] != self.tokens[self.position]:
                break
        self.drafts = []


class DecodeState(SequenceState):
    """The sequences of a program, and their cache; it is itself the first of them.
    `hidden`, fp32 [hidden_size], is what prefill would have left for a program that begins with the last layer.

    Only what depends on neither bucket nor slices is used of the shape, so that all programs of a model can share it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.config.vocab_size, shape.capacity)
        self.cache = KvCache(shape)
        self.hidden: torch.Tensor | None = None
        others = (SequenceState(self.vocab_size, self.capacity) for _ in range(shape.sequences - 1))
        self.sequences: list[SequenceState] = [self, *others]

    def start(
        self, prompt: Sequence[int], sampling: SamplingState = GREEDY, stop_tokens: Collection[int] = frozenset()
    ) -> None:
        """Begin a new sequence with a prompt of at least one token, forgetting the one before."""
        self.join(0, prompt, sampling, stop_tokens)
        self.hidden = None

    def join(
        self,
        number: int,
        prompt: Sequence[int],
        sampling: SamplingState = GREEDY,
        stop_tokens: Collection[int] = frozenset(),
    ) -> None:
        """Begin a new sequence as number `number`; the others go on."""
        self.cache.clear(number)
        self.sequences[number].begin(prompt, sampling, stop_tokens)
