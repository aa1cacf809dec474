"""Programs of several columns on the GPU below the engine: steps from wherever the sequences stand."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from bench.rig import HEAD_START, device_sms
from instructions.base import GREEDY, SamplingState
from megakernel.control_block import Source
from megakernel.gpu.columns import ColumnProgram, Landed, give_drafts, join_sequence, place_sequence
from megakernel.gpu.machine import GpuState
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms

ITEMSIZE = 2


def column_programs(model: PackedModel, sequences: int = 1, depth: int = 1) -> BucketPrograms:
    """The programs of a model with so many columns, on all SMs of the GPU."""
    sizes = (model.config, device_sms(), model.capacity, ITEMSIZE)
    return BucketPrograms(*sizes, formats=model.tape.formats, sequences=sequences, depth=depth)


class ColumnRig:
    """The sequences of a program and where they stand.  `join` begins one, `run` goes on with all of them.

    `alone` are the programs of one column: they say into how many slices a context is split.
    """

    def __init__(
        self, model: PackedModel, programs: BucketPrograms, alone: BucketPrograms, state: GpuState | None = None
    ) -> None:
        self.programs, self.alone = programs, alone
        pages = programs.shape(programs.capacity).cache_pages
        device = torch.device("cuda", 0)
        self.state = GpuState(model, pages, device, programs.sequences) if state is None else state
        self.made: dict[int, ColumnProgram] = {}
        self.positions = [0] * programs.sequences
        self.ends = [0] * programs.sequences
        self.source = Source.LOOK_UP
        self.placed: list[tuple[int, ...]] = [()] * programs.sequences
        for number in range(programs.sequences):
            join_sequence(self.state, number, [0], GREEDY, ())

    def program(self, position: int) -> ColumnProgram:
        """The program whose bucket holds a position."""
        place = self.programs.place(position)
        if place not in self.made:
            self.made[place] = ColumnProgram(self.programs.program(place), self.state)
        return self.made[place]

    def join(
        self,
        number: int,
        tokens: Sequence[int],
        end: int,
        sampling: SamplingState = GREEDY,
        stop_tokens: Collection[int] = (),
        position: int = 0,
    ) -> None:
        """Begin sequence `number` at a position, where its cache holds all before; it is decoded up to `end`, not included."""
        join_sequence(self.state, number, tokens, sampling, stop_tokens)
        self.placed[number] = ()
        self.positions[number], self.ends[number] = position, end

    def give(self, position: int, tokens: Sequence[int]) -> None:
        """Take drafts from these tokens, which may follow from `position` on, and look none up."""
        give_drafts(self.state, position, tokens)
        self.source = Source.GIVEN

    def limits(self) -> tuple[int, list[int]]:
        """The position that decides the bucket, and how far each sequence may go before it is sliced otherwise."""
        running = [place for place, (at, end) in enumerate(zip(self.positions, self.ends, strict=True)) if at < end]
        ends = [min(end, self.alone.cut(at, max(end, at + 1))[1]) for at, end in zip(self.positions, self.ends, strict=True)]
        return max((self.positions[place] for place in running), default=0), ends

    def place(self) -> ColumnProgram:
        """Tell every sequence where it stands, where that has changed but by its own steps; returns the program to go on
        with."""
        longest, ends = self.limits()
        for number, (position, end) in enumerate(zip(self.positions, ends, strict=True)):
            slices = self.alone.shape(self.alone.sizes[self.alone.place(position)]).slices
            if self.placed[number] != (end, slices, self.source):
                place_sequence(self.state, number, position, end, slices, self.source)
                self.placed[number] = (end, slices, self.source)
        return self.program(longest)

    def run(self, steps: int) -> tuple[int, list[Landed]]:
        """Up to so many steps in one launch, none across the edge of a bucket; the steps made, and what became of each."""
        made, landed = self.place().launch_steps(steps, self.positions).land()
        self.positions = [found.position for found in landed]
        return made, landed

    def finish(self, steps: int = 16) -> list[list[int]]:
        """Go on until every sequence has ended; the tokens of each."""
        found: list[list[int]] = [[] for _ in self.positions]
        stopped = [False] * len(found)
        while any(at < end and not ended for at, end, ended in zip(self.positions, self.ends, stopped, strict=True)):
            made, landed = self.run(steps)
            for number, each in enumerate(landed):
                found[number] += each.tokens
                stopped[number] = stopped[number] or each.stopped
            if not made:
                break
        return found

    def timed(self, steps: int, launches: int) -> tuple[float, int, int]:
        """Milliseconds a step of launches back to back, by the GPU's own events; the tokens of all sequences, and the steps,
        that
        they made."""
        program = self.place()
        begin, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        flights = [program.launch_steps(steps, self.positions) for _ in range(launches)]
        end_event.record()
        made = 0
        for flight in flights:
            count, landed = flight.land()
            made += count
        tokens = sum(found.position - before for found, before in zip(landed, self.positions, strict=True))
        self.positions = [found.position for found in landed]
        return float(begin.elapsed_time(end_event)) / max(made, 1), tokens, made
