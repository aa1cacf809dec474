"""Where a step stands: for every column its position and its token, fixed when the step begins."""

from __future__ import annotations

from typing import NamedTuple

from instructions.shape import Shape
from megakernel.vm.errors import Fault
from megakernel.vm.state import DecodeState


class Column(NamedTuple):
    """A column of a step: whose it is, the position that it computes, and the positions that the cache held before the step."""

    sequence: int
    position: int
    cached: int


class Step:
    """All columns of a step.  Those that a sequence has no tokens for repeat its last one: they compute and store the same.

    A sequence without a token (none has begun there) computes token 0 at position 0, one of several that has reached its end
    its last position again.  One of several whose `end` is 0 takes no part: it computes position 0, and what the cache holds of
    it stays.  `limit` is the first position that the program and its tables cannot decode.
    """

    def __init__(self, shape: Shape, state: DecodeState, limit: int) -> None:
        self.shape, self.state, self.limit = shape, state, limit
        self.columns: list[Column] = []
        self.tokens: list[int] = []
        self.used: list[int] = []  # columns of each sequence
        self.chosen: dict[int, int] = {}  # by column
        self.ended = False
        for number, sequence in enumerate(state.sequences):
            first, end = sequence.position, min(sequence.end, limit)
            coming = sequence.coming() or [0]
            if first >= end and shape.sequences > 1:
                first = max(end - 1, 0)
                coming = sequence.tokens[first : first + 1] or [0]
                if sequence.end > 0:
                    state.cache.truncate(number, first)
            used = min(len(coming), shape.usable(first, end))
            places = [min(place, used - 1) for place in range(shape.depth)]
            self.columns += [Column(number, first + place, first) for place in places]
            self.tokens += [coming[place] for place in places]
            self.used.append(used)

    def takes_part(self, sequence: int) -> bool:
        """Whether a sequence's keys and values are cached."""
        return self.shape.sequences == 1 or self.state.sequences[sequence].end > 0

    def slices(self, sequence: int) -> int:
        """Into how many a sequence's context is split."""
        return self.state.sequences[sequence].slices or self.shape.slices

    def choose(self, column: int, token: int) -> None:
        """A column has chosen the token after its own; with the last one of them, positions advance."""
        if self.shape.columns == 1:
            self.state.emit(self.columns[0].position, token)
            self.ended = True
            return
        if column in self.chosen:
            raise Fault(f"chooses a token for column {column} twice")
        self.chosen[column] = token
        if len(self.chosen) == self.shape.columns:
            self.ended = True
            for number, sequence in enumerate(self.state.sequences):
                self.accept(number, sequence.runs(self.limit))

    def accept(self, number: int, runs: bool) -> None:
        """Advance one sequence, and draft what may follow."""
        sequence, first = self.state.sequences[number], self.shape.columns_of(number)[0]
        if runs:
            sequence.accept([self.chosen[first + place] for place in range(self.used[number])])
        if self.takes_part(number):
            self.state.cache.truncate(number, sequence.position)
        if runs and self.shape.depth > 1 and sequence.position >= sequence.prompt_length - 1 and not sequence.stopped:
            sequence.drafts = sequence.source(sequence.tokens, self.shape.depth - 1)
