"""The backend with drafts: launches of several columns of the sequence where that pays, of one column where it does not.

Both kinds of program work on one state and give the same tokens, so a change between launches costs a wait for those under way
and nothing else: only the GPU knows where a sequence stands that drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from megakernel.errors import NotNumbers
from megakernel.gpu.backend import CHUNK, GpuBackend, Prefill, Reading
from megakernel.gpu.columns import ColumnFlight, ColumnProgram, place_sequence
from megakernel.gpu.machine import Flight, GpuState
from megakernel.gpu.pace import TRIAL, Pace
from megakernel.options import Sizes
from megakernel.sequence import Sequence
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms


class DraftingBackend(GpuBackend):
    """See `megakernel.backend.Backend`.  `drafted` are the programs of several columns of one sequence; of sequences it
    decodes one, as the backend without drafts."""

    def __init__(
        self,
        model: PackedModel,
        programs: BucketPrograms,
        drafted: BucketPrograms,
        device: torch.device,
        prefill: Callable[[GpuState, Sizes, int], Prefill] | None = None,
    ) -> None:
        self.drafted = drafted
        self.pace = Pace([])
        self.placed = (-1, -1)  # where the GPU knows the sequence to stand and to end, by its own steps
        super().__init__(model, programs, device, prefill)
        with self.on_device("compiling the kernel"):
            self.column_program(0).result().compile()

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        prompt = sequence.prompt
        self.pace, self.placed = Pace(prompt), (-1, -1)
        if len(prompt) < self.end:
            for place in range(self.programs.place(len(prompt)), self.programs.place(self.end - 1) + 1):
                self.column_program(place)

    @property
    def drafting(self) -> bool:
        """Whether the launch that was enqueued last is one of several columns."""
        return bool(self.flights) and isinstance(self.flights[-1], ColumnFlight)

    def room(self) -> bool:
        """Launches of one column wait until those of several have landed, and so does a change of the bucket."""
        if not super().room() or not self.drafting:
            return super().room()
        _, end = self.programs.cut(self.position, self.end)
        return self.pace.drafting and end == self.placed[1]

    def take_off(self) -> None:
        length = len(self.sequence.prompt)
        if self.position < length or not self.pace.drafting:
            super().take_off()
            return
        self.settled = False
        place, end = self.programs.cut(self.position, self.end)
        program = self.column_program(place).result()
        if not self.drafting and (self.position, end) != self.placed:
            place_sequence(self.state, 0, self.position, end, program.bucket.slices)
            self.placed = self.position, end
        steps = TRIAL if self.position == length else min(CHUNK, self.longest)
        self.flights.append(program.launch_steps(steps, [self.position]))

    def decode(self, count: int) -> None:
        """A launch behind another that has reached the bucket's end makes no step; then the next one counts."""
        before = self.sequence.position, len(self.sequence.tokens)
        while before == (self.sequence.position, len(self.sequence.tokens)):
            super().decode(count)

    def take_in(self, flight: Flight | Reading | ColumnFlight) -> None:
        sequence = self.sequence
        if not isinstance(flight, ColumnFlight):
            count = len(sequence.tokens)
            super().take_in(flight)
            self.pace.landed(sequence.tokens[count:], 0)
            return
        steps, [found] = flight.land()
        if found.numberless:
            raise NotNumbers(found.position - 1)
        made = found.tokens[self.position - flight.firsts[0] :]
        if made:
            self.last_program, self.last_column = flight.program, found.last
        self.stopped = self.stopped or found.stopped
        sequence.take(made)
        if steps:
            sequence.steps += steps
            self.position = sequence.position = found.position
            self.placed = found.position, self.placed[1]
            self.pace.landed(made, steps)

    def column_program(self, place: int) -> Future[ColumnProgram]:
        """The program of several columns of one bucket, as `program`."""
        return self.building.get(place, self.making(lambda: ColumnProgram(self.drafted.program(place), self.state)))

    def close(self) -> None:
        super().close()
        self.drafted.close()
