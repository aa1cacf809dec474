"""How sequences share a KV cache: each has its own part, blocks of rows that it may write, behind blocks that it may only read.

A part is what a sequence can take at most, so that one that has joined is never short of rows.  What a prompt begins with is
looked for in all that the cache holds: of sequences under way, and of those that have left.  Blocks that are whole in both are
shared by reference, the rows after them copied.  What those that have left wrote stays until its room is needed, the
longest unused first.

Which blocks are free follows from who has which: nothing is counted, so an interrupt at any moment leaves nothing miscounted.
Knows rows by number, not what is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from megakernel.backend import shared_length
from megakernel.sequence import Sequence

BLOCK = 16  # rows


@dataclass(eq=False)
class Held:
    """What the cache holds: the keys and values of `tokens`, in as many rows of `blocks`.  `left`: nobody will write there."""

    tokens: list[int]
    blocks: list[int]
    left: bool = True


class Parts:
    """The parts of a cache of at least `capacity` rows, `blocks` blocks.  `copy` copies the rows of one block to another."""

    def __init__(self, capacity: int, copy: Callable[[int, int], None]) -> None:
        self.blocks = -(-capacity // BLOCK)
        self.copy = copy
        self.running: list[Sequence] = []
        self.held: list[Held] = []  # of those that have left, the longest unused first

    def join(self, sequence: Sequence) -> bool:
        """Give a sequence its part: `part`, `kept` and `position` are set.  False, and nothing has changed, where there is not
        enough room beside those under way."""
        source, kept = self.longest(sequence)
        whole, rest = divmod(kept, BLOCK)
        goes_on = source.left and kept == len(source.tokens)  # then its last block is taken over as it is
        shared = source.blocks[: whole + bool(rest and goes_on)]
        busy = {*shared, *chain.from_iterable(one.part for one in self.running)}
        wanted = -(-sequence.rows // BLOCK) - len(shared)
        if self.blocks - len(busy) < wanted:
            return False
        held = [one for one in self.held if one is not source]
        held += [source] if source.left and kept and not goes_on else []  # used just now
        while self.blocks - len(busy.union(*(one.blocks for one in held))) < wanted:
            held.pop(0)
        self.held = held
        taken = busy.union(*(one.blocks for one in held))
        first = shared[-1] + 1 if shared else 0
        order = chain(range(first, self.blocks), range(first))  # in one piece, where that can be
        own = [block for block in order if block not in taken][:wanted]
        if rest and not goes_on:
            self.copy(source.blocks[whole], own[0])
        sequence.part = shared + own
        sequence.kept = sequence.position = kept
        self.running.append(sequence)
        return True

    def join_again(self, sequence: Sequence) -> None:
        """Look once more for the beginning of a prompt of which nothing has been read yet: others may have read it since."""
        self.running.remove(sequence)
        if not self.join(sequence):
            raise RuntimeError("a sequence does not fit where it was")

    def leave(self, sequence: Sequence) -> None:
        """Take a part back; what was written stays until its room is needed."""
        if sequence not in self.running:
            return
        self.running.remove(sequence)
        tokens = sequence.tokens[: sequence.position]
        if tokens:
            held = [one for one in self.held if one.tokens != tokens[: len(one.tokens)]]
            self.held = [*held, Held(tokens, sequence.part[: -(-len(tokens) // BLOCK)])]

    def longest(self, sequence: Sequence) -> tuple[Held, int]:
        """What the cache holds that a prompt begins like for longest, and for how many tokens.

        The last token is computed in any case: its logits are asked for.
        """
        best, most, prompt = Held([], []), 0, sequence.prompt
        if sequence.reuse:
            running = (Held(one.tokens[: one.position], one.part, left=False) for one in self.running)
            for known in chain(self.held, running):
                length = shared_length(known.tokens, prompt, len(prompt) - 1)
                if length > most:
                    best, most = known, length
        return best, most
