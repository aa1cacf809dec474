"""Context buckets: which program decodes which position.

A program is made for a most number of past positions, its bucket: its page plan holds as many KV pages as that takes.  An
engine keeps a few programs and switches between tokens.  Which one decodes a token depends on its position alone, so a result
never depends on how a sequence was cut into launches.

Few and far apart, because each costs scheduling and a proof, and because a program with more slices than a short context
needs loses little: the first serves short contexts with no combination of slices, the second contexts of some thousands, and
from there on they grow by 4, so that few page uses pass empty.

Each bucket has a second program, its tail: the last layer and the head alone, for the last token of a prompt that prefill has
read.  It is made for the same sizes, so the same kernel runs it.

Programs of several columns are `BucketPrograms` of their own, with a kernel of their own, and have no tails.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

from instructions.shape import Shape
from models.config import ModelConfig
from models.formats import PLAIN, Formats
from scheduler.ahead import Ahead, Which
from scheduler.build import DEFAULT_POLICY, build_program, make_shape
from scheduler.program import Program

FIRST_PAGES = 2  # KV pages of the first bucket
SECOND_PAGES = 32  # of the second
MAKING = Lock()  # one program is made at a time: it is all Python, and two at once would take as long
GROWTH = 4  # from each bucket to the next, from there on


def bucket_sizes(capacity: int, page_positions: int) -> tuple[int, ...]:
    """The buckets of a cache of `capacity` positions, ascending: 2, 32, 128, 512, ... KV pages, and at last the capacity."""
    sizes, pages = [], FIRST_PAGES
    while pages * page_positions < capacity:
        sizes.append(pages * page_positions)
        pages = SECOND_PAGES if pages == FIRST_PAGES else pages * GROWTH
    return (*sizes, capacity)


def bucket_of(past: int, sizes: tuple[int, ...]) -> int:
    """Place in `sizes` of the smallest bucket that holds `past` positions."""
    place = bisect_left(sizes, past)
    if past < 0 or place == len(sizes):
        raise ValueError(f"no bucket holds {past} past positions; the largest is {sizes[-1]}")
    return place


@dataclass
class BucketPrograms:
    """The programs of one model on one machine, each built when it is first asked for."""

    config: ModelConfig
    sms: int
    capacity: int
    itemsize: int
    policy: str = DEFAULT_POLICY
    formats: Formats = PLAIN
    sequences: int = 1
    depth: int = 1
    _built: dict[Which, Program] = field(default_factory=dict)
    _ahead: Ahead | None = field(default=None, repr=False, compare=False)

    def shape(self, bucket: int, tail: bool = False) -> Shape:
        """The shape of one bucket's program; raises ScheduleError for numbers no program can be made for."""
        sizes = {"sms": self.sms, "capacity": self.capacity, "bucket": bucket, "itemsize": self.itemsize}
        columns = {"sequences": self.sequences, "depth": self.depth}
        return make_shape(self.config, **sizes, tail=tail, formats=self.formats, **columns)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Most past positions of each program, ascending."""
        return bucket_sizes(self.capacity, self.shape(self.capacity).page_positions)

    def place(self, past: int) -> int:
        """Which program decodes the token with `past` positions before it, as a place in `sizes`."""
        return bucket_of(past, self.sizes)

    def cut(self, position: int, end: int) -> tuple[int, int]:
        """Which program decodes the token at `position`, as a place in `sizes`, and where a launch from there to `end` has to
        stop, because another program goes on."""
        place = self.place(position)
        return place, min(end, self.sizes[place] + 1)

    def program(self, place: int, tail: bool = False) -> Program:
        """A program, or its tail, by its place in `sizes`; raises ScheduleError where none can be made."""
        key = place, tail
        if key not in self._built and self._ahead is not None and (made := self._ahead.take(key)) is not None:
            self._built.setdefault(key, made)
        if key not in self._built:
            with MAKING:
                if key not in self._built:
                    self._built[key] = build_program(self.shape(self.sizes[place], tail), self.sms, self.policy)
        return self._built[key]

    def build_ahead(self, places: Iterable[int]) -> None:
        """Begin to make programs, each after its tail, in this order, in a process of their own; one that cannot be made is
        refused when it is asked for.  Ends with this process, or with `close`."""
        self.close()
        names = ("sms", "capacity", "itemsize", "policy", "formats", "sequences", "depth")
        numbers = {name: getattr(self, name) for name in names}
        tails = (True, False) if self.sequences * self.depth == 1 else (False,)  # a tail is for one token
        wanted = [(place, tail) for place in places for tail in tails]
        self._ahead = Ahead(self.config.to_dict(), numbers, wanted, lambda which: self.shape(self.sizes[which[0]], which[1]))

    def close(self) -> None:
        """Make nothing ahead any more."""
        if self._ahead is not None:
            self._ahead.close()
