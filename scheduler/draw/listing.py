"""A program's records one after another, as drawings ask for them: their places, what they touch, who signals a counter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instructions.base import Region
from instructions.codec import Scheduled, disassemble
from scheduler.program import Program


@dataclass(frozen=True, eq=False)
class Listing:
    """Records are numbered SM by SM; record i stands in queue `sm[i]` at place `index[i]`."""

    program: Program

    @cached_property
    def items(self) -> list[Scheduled]:
        """The records, decoded."""
        return [item for queue in self.program.decoded for item in queue]

    @property
    def sm(self) -> np.ndarray:
        """The SM of each record, int64 [instructions]."""
        return self.program.sm

    @cached_property
    def index(self) -> np.ndarray:
        """The place of each record in its queue, int64 [instructions]."""
        places: np.ndarray = np.arange(len(self.sm)) - self.program.starts[self.sm]
        return places

    @property
    def targets(self) -> np.ndarray:
        """Signals each counter gets in one token, int32 [counters]."""
        return self.program.targets

    @cached_property
    def reads(self) -> list[tuple[Region, ...]]:
        """What each record reads."""
        return [item.instruction.reads(self.program.shape) for item in self.items]

    @cached_property
    def writes(self) -> list[tuple[Region, ...]]:
        """What each record writes."""
        return [item.instruction.writes(self.program.shape) for item in self.items]

    @cached_property
    def producers(self) -> list[list[int]]:
        """The records that signal each counter."""
        found: list[list[int]] = [[] for _ in self.targets]
        for i, item in enumerate(self.items):
            for counter in item.signals:
                found[counter].append(i)
        return found

    def text(self, i: int) -> str:
        """Record i, disassembled."""
        return " ".join(disassemble(self.items[i]).split())

    def place(self, i: int) -> str:
        """Record i with its place."""
        return f"sm {self.sm[i]} #{self.index[i]} [{self.text(i)}]"
