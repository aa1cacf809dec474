"""A program taken apart so that a fault can be planted, and put together again without any check.

A draft knows how to keep the rest of a program consistent (page numbers, targets), so that a fault is not given away by
something beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np

from instructions.base import Instruction
from instructions.codec import WORDS, CodecError, Scheduled, Wait, decode, encode
from instructions.shape import Buffer, Shape
from scheduler.program import Program

Site = tuple[int, int]  # SM, place in its queue
Mutation = Callable[["Draft", Random], bool]  # plants a fault, or says that it found no place for one
MUTATIONS: dict[str, Mutation] = {}


def mutation(plant: Mutation) -> Mutation:
    """Enter a function into the list of kinds, under its name."""
    MUTATIONS[plant.__name__] = plant
    return plant


@dataclass
class Draft:
    """Queues of records, free to be changed; `pokes` are single words written last, (sm, index) -> {word: value}."""

    shape: Shape
    policy: str
    ring: int
    queues: list[list[Scheduled]]
    targets: list[int]
    uses: list[int]
    pokes: dict[Site, dict[int, int]] = field(default_factory=dict)
    sizes: list[int] | None = None  # queue lengths to state in place of the true ones

    @classmethod
    def of(cls, program: Program) -> Draft:
        """Take a valid program apart."""
        queues = [[decode(record) for record in program.queue(sm)] for sm in range(program.sms)]
        return cls(program.shape, program.policy, program.ring, queues, program.targets.tolist(), program.uses.tolist())

    def sites(self, wanted: Callable[[Scheduled], object] = bool) -> list[Site]:
        """Where the records stand that are `wanted`."""
        return [(sm, i) for sm, queue in enumerate(self.queues) for i, item in enumerate(queue) if wanted(item)]

    def pick(self, random: Random, wanted: Callable[[Scheduled], object] = bool) -> Site | None:
        """One of them, or None."""
        found = self.sites(wanted)
        return random.choice(found) if found else None

    def at(self, site: Site) -> Scheduled:
        """The record at a place."""
        return self.queues[site[0]][site[1]]

    def change(self, site: Site, **changes: Any) -> None:
        """Replace fields of a record."""
        self.queues[site[0]][site[1]] = replace(self.at(site), **changes)

    def change_one(self, random: Random, wanted: Callable[[Scheduled], object], **changes: Any) -> bool:
        """Replace fields of one of the records that are `wanted`; False where there is none."""
        site = self.pick(random, wanted)
        if site is None:
            return False
        self.change(site, **changes)
        return True

    def work(self, site: Site, **changes: int) -> bool:
        """Replace fields of the instruction itself, with its pages to match; False where it then has no meaning."""
        return self.set_work(site, replace(self.at(site).instruction, **changes))

    def set_work(self, site: Site, instruction: Instruction) -> bool:
        """Let a record do something else; False where that has no meaning."""
        try:
            pages = instruction.page_uses(self.shape)
            tape = instruction.tape_page(self.shape) if pages else 0
        except (KeyError, IndexError):
            return False
        self.change(site, instruction=instruction, pages=pages, tape=tape)
        self.renumber()
        return True

    def producers(self, counter: int) -> list[Site]:
        """Who signals a counter."""
        return self.sites(lambda item: counter in item.signals)

    def renumber(self) -> None:
        """Count page uses anew."""
        for sm, queue in enumerate(self.queues):
            used = 0
            for index, item in enumerate(queue):
                queue[index] = replace(item, page=used)
                used += item.pages
            self.uses[sm] = used

    def retarget(self) -> None:
        """Let every wait ask for as many signals as its counter gets, and state as many."""
        given = Counter(counter for queue in self.queues for item in queue for counter in item.signals)
        self.targets = [given[counter] for counter in range(len(self.targets))]
        for sm, index in self.sites():
            item = self.at((sm, index))
            load = self.fitted(item.load_wait) if item.load_wait else None
            self.change((sm, index), waits=tuple(self.fitted(wait) for wait in item.waits), load_wait=load)

    def fitted(self, wait: Wait) -> Wait:
        """A wait for all signals of its counter."""
        return Wait(wait.counter, self.targets[wait.counter], wait.lag)

    def poke(self, site: Site, word: int, value: int) -> None:
        """Write a single word."""
        self.pokes.setdefault(site, {})[word] = value

    def alter_buffers(self, **altered: Buffer) -> None:
        """Lay buffers elsewhere in memory."""
        self.shape = replace(self.shape)
        self.shape.__dict__["buffers"] = {**self.shape.buffers, **altered}

    def records(self) -> Iterator[np.ndarray]:
        """All records, encoded; raises CodecError where one does not fit."""
        for sm, queue in enumerate(self.queues):
            for index, item in enumerate(queue):
                record = encode(item)
                for word, value in self.pokes.get((sm, index), {}).items():
                    record[word] = value
                yield record

    def program(self) -> Program | None:
        """Put together again, unchecked; None where a record cannot be encoded at all."""
        try:
            words = np.array(list(self.records()), dtype=np.int32).reshape(-1, WORDS)
        except CodecError:
            return None
        sizes = [len(queue) for queue in self.queues] if self.sizes is None else self.sizes
        starts = np.cumsum([0, *sizes], dtype=np.int32)
        arrays = (np.array(numbers, dtype=np.int32) for numbers in (self.targets, self.uses))
        return Program(self.shape, self.policy, self.ring, words, starts, *arrays)


def same(a: Program, b: Program) -> bool:
    """Whether two programs are equal word for word."""
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("words", "starts", "targets", "uses"))
    return arrays and a.ring == b.ring and a.shape == b.shape and a.shape.buffers == b.shape.buffers
