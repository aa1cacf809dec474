"""The backend with drafts: launches of several columns of the sequence where that pays, of one column where it does not.

Both kinds of program work on one state and give the same tokens, so a change between launches costs a wait for those under way
and nothing else: only the GPU knows where a sequence stands that drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from megakernel.errors import NotNumbers
from megakernel.gpu.backend import CHUNK, FLIGHTS, GpuBackend, Prefill
from megakernel.gpu.columns import ColumnFlight, ColumnProgram, place_sequence
from megakernel.gpu.errors import KernelFault
from megakernel.gpu.machine import GpuProgram, GpuState
from megakernel.gpu.pace import TRIAL, Pace
from megakernel.options import Sizes
from megakernel.request import SamplingParams
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms


class DraftingBackend(GpuBackend):
    """See `megakernel.backend.Backend`.  `drafted` are the programs of several columns of one sequence.

    `steps` counts those of the request; its tokens over them say what drafts are worth.
    """

    def __init__(
        self,
        model: PackedModel,
        programs: BucketPrograms,
        drafted: BucketPrograms,
        device: torch.device,
        prefill: Callable[[GpuState, Sizes, int], Prefill] | None = None,
    ) -> None:
        self.drafted = drafted
        self.columns_built: dict[int, Future[ColumnProgram]] = {}
        self.column_flights: list[ColumnFlight] = []
        self.pace, self.last_column = Pace([]), 0
        self.placed = (-1, -1)  # where the GPU knows the sequence to stand and to end, by its own steps
        super().__init__(model, programs, device, prefill)
        with self.on_device("compiling the kernel"):
            self.column_program(0).result().compile()

    def begin(self, prompt: list[int], limit: int, sampling: SamplingParams, reuse: bool) -> None:
        super().begin(prompt, limit, sampling, reuse)
        self.pace, self.placed = Pace(prompt), (-1, -1)
        if len(prompt) < self.end:
            for place in range(self.programs.place(len(prompt)), self.programs.place(self.end - 1) + 1):
                self.column_program(place)

    def room(self) -> bool:
        """Launches of one column wait until those of several have landed, and so does a change of the bucket."""
        if not self.column_flights:
            return super().room()
        flying = len(self.column_flights)
        return self.pace.drafting and super().room() and flying < FLIGHTS

    def take_off(self) -> None:
        if self.position < self.prompt_length or not self.pace.drafting:
            super().take_off()
            return
        self.settled = False
        place, end = self.programs.cut(self.position, self.end)
        program = self.column_program(place).result()
        if (self.position, end) != self.placed and not self.column_flights:
            place_sequence(self.state, 0, self.position, end, program.bucket.slices)
            self.placed = self.position, end
        steps = TRIAL if self.position == self.prompt_length else min(CHUNK, self.longest)
        flight = program.launch_steps(steps, [self.position])
        self.column_flights.append(flight)
        self.flights.append(flight)  # type: ignore[arg-type]

    def land(self) -> None:
        flight = self.flights[0]
        if not isinstance(flight, ColumnFlight):
            count = len(self.sequence)
            super().land()
            made = self.sequence[count:]
            self.pace.landed(made, 0)
            self.steps += len(made)
            return
        self.flights.popleft()
        self.column_flights.remove(flight)
        try:
            steps, [found] = flight.land()
        except KernelFault:
            self.recover()
            raise
        if found.numberless:
            raise NotNumbers(found.position - 1)
        made = found.tokens[self.position - flight.firsts[0] :]
        if made:
            self.last_program, self.last_column = flight.program, found.last
        self.ready.extend(made)
        self.sequence.extend(made)
        self.stopped = self.stopped or found.stopped
        if steps:
            self.position = self.cached = found.position
            self.placed = found.position, self.placed[1]
            self.steps += steps
            self.pace.landed(made, steps)
        self.settled = not self.flights

    def logits(self) -> torch.Tensor:
        if not isinstance(self.last_program, ColumnProgram):
            return super().logits()
        with self.on_device("reading logits"):
            return self.last_program.logits(self.last_column)

    def column_program(self, place: int) -> Future[ColumnProgram]:
        """The program of several columns of one bucket, as `program`."""
        known = self.columns_built.get(place)
        if known is None or (known.done() and known.exception() is not None):
            self.columns_built[place] = self.builder.submit(self.build_columns, place)
        return self.columns_built[place]

    def build_columns(self, place: int) -> ColumnProgram:
        """Schedule one bucket's program of several columns."""
        with self.on_device("making a program"):
            return ColumnProgram(self.drafted.program(place), self.state)

    def abandon(self) -> None:
        if not self.settled:
            self.column_flights.clear()
        super().abandon()

    def recover(self) -> None:
        self.column_flights.clear()
        super().recover()

    def close(self) -> None:
        super().close()
        self.drafted.close()
        self.columns_built.clear()

    def programs_built(self) -> list[GpuProgram]:
        done = (future for future in self.columns_built.values() if future.done() and future.exception() is None)
        return [*super().programs_built(), *(future.result() for future in done)]
