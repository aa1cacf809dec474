"""Who can see whose stores: vector clocks, kept while a program runs (Mattern, 1988).

That an instruction has ended does not mean that others see what it stored.  A clock says, of every SM, how many of its
instructions of this launch have ended so that their stores are visible to the clock's owner.  It grows along the owner's own
queue, with the release of a page, and with every signal that releases; other signals carry nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megakernel.vm.errors import Fault

Clock = np.ndarray  # int64 [sms]; replaced, never changed, so that it can be kept


def merged(clock: Clock, other: Clock) -> Clock:
    """What is visible to either."""
    return clock if clock is other or (other <= clock).all() else np.maximum(clock, other)


class Moment(NamedTuple):
    """An instruction that is running: on which SM, and as which of its instructions in this launch, counted from 1."""

    sm: int
    number: int


def ended(clock: Clock, moment: Moment) -> Clock:
    """The clock of an SM when its instruction has ended."""
    after = clock.copy()
    after[moment.sm] = moment.number
    return after


def before(number: int, length: int) -> int:
    """The number, in its SM's launch, of the same instruction a token before; 0 or less: the launch had none."""
    return number - length


class Stores:
    """The instruction that last stored each of some rows, since the launch began; what was there before all can see."""

    def __init__(self, *shape: int) -> None:
        self.sm = np.zeros(shape, dtype=np.int32)
        self.number = np.zeros(shape, dtype=np.int64)

    def note(self, place: tuple[int | slice, ...], moment: Moment) -> None:
        """Rows are stored."""
        self.sm[place], self.number[place] = moment

    def last(self, place: slice) -> Iterator[Moment]:
        """Who last stored each of some rows."""
        for sm, number in zip(self.sm[place], self.number[place], strict=True):
            yield Moment(int(sm), int(number))

    def check(self, place: tuple[int | slice, ...], clock: Clock, action: str) -> None:
        """Raises Fault where the owner of a clock would touch rows that it may not see yet."""
        unseen = clock[self.sm[place]] < self.number[place]
        if unseen.any():
            row = int(unseen.argmax())
            sm = int(self.sm[place][row])
            raise Fault(f"{action}, but row {row} of it, stored by sm {sm}, is not visible yet: no release led here from there")


def check_begin(clock: Clock, lengths: np.ndarray, token: int) -> None:
    """Raises Fault where an SM begins a token without seeing all that the tokens before have stored."""
    unseen = np.flatnonzero(clock < token * lengths)
    if len(unseen):
        other = int(unseen[0])
        raise Fault(
            f"begins token {token}, but of sm {other} it sees only {int(clock[other])} of {token * int(lengths[other])} "
            "instructions: no signal that releases led to the end of the token from all of them"
        )


class Sight:
    """What the SMs of one launch share: the clock of each counter, and who stored what."""

    def __init__(self, lengths: Sequence[int], counters: int, activations: int, layers: int, rows: int) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.nothing: Clock = np.zeros(len(lengths), dtype=np.int64)
        self.counters: list[Clock] = [self.nothing] * counters
        self.activations = Stores(activations)
        self.cache = Stores(2, layers, rows)  # of even and of odd epochs: the next is stored while this one is read
        self.token = Stores(1)  # the last token, and with it where the next step begins

    def release(self, clock: Clock, counter: int) -> None:
        """A signal carries a clock to those who wait for its counter."""
        self.counters[counter] = merged(self.counters[counter], clock)
