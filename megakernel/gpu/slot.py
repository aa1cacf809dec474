"""A slot: one sequence's place in the tokens, the cache and the control block, and how far its sequence has been enqueued."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from megakernel.gpu.machine import GpuProgram, GpuState
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence


@cache
def nobody() -> Sequence:
    """A sequence of which the cache holds nothing."""
    return Sequence([], 0, SamplingParams())


@dataclass(eq=False)
class Slot:
    """What the cache is known to hold here are the first `sequence.position` tokens of `sequence`, which has the slot or,
    unless it is `taken`, had it last: keys and values of launches that have landed.

    state: the model with this sequence alone.
    read, position, end: up to where prefill has been enqueued, the next to be decoded by a launch, the one behind the last.
    used: when the slot was last begun or left, in counts of both; 0: never.
    last: the program that chose the newest token, in one column; its logits are there until it is launched again.
    """

    number: int
    state: GpuState
    sequence: Sequence = field(default_factory=nobody)
    taken: bool = False
    read: int = 0
    position: int = 0
    end: int = 0
    used: int = 0
    last: tuple[GpuProgram, int] | None = None

    @property
    def known(self) -> list[int]:
        """The tokens whose keys and values the cache holds, or will hold before anything enqueued from now on."""
        if self.taken and not self.sequence.ended:
            return self.sequence.tokens[: max(self.read, self.sequence.position)]
        return self.sequence.tokens[: self.sequence.position]

    @property
    def going(self) -> bool:
        """Whether its sequence has anything left to be enqueued."""
        return self.taken and not self.sequence.ended and self.position < self.end

    @property
    def in_prompt(self) -> bool:
        """Whether what is next are positions of the prompt."""
        return self.position < len(self.sequence.prompt)

    def begin(self, sequence: Sequence, kept: int, moment: int) -> None:
        """Take in a sequence, of which the cache holds the first `kept` tokens here."""
        sequence.kept = sequence.position = kept
        self.sequence, self.last, self.used = sequence, None, moment
        self.read, self.position, self.end = kept, kept, sequence.rows
        self.taken = True

    def forget(self) -> Sequence:
        """The cache is about to hold something else here; returns whose rows it held."""
        before, self.sequence = self.sequence, nobody()
        return before
