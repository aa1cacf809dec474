"""What the backends on a GPU have in common: the device and its stream, and the programs of one column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from triton.errors import TritonError

from megakernel.errors import one_line
from megakernel.gpu.building import Building
from megakernel.gpu.machine import GpuProgram, GpuState
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms

LONGEST_LAUNCH = 0.25  # seconds, so that an interrupt is answered soon
SLOW_BANDWIDTH = 2.0e12  # bytes a second, to bound a launch's time from above


class OnGpu:
    """A model and its programs of one column on a GPU, for `sequences` of them.  `longest`: most tokens of a launch."""

    name = "gpu"

    def __init__(self, model: PackedModel, programs: BucketPrograms, device: torch.device, sequences: int = 1) -> None:
        self.config, self.capacity = model.config, programs.capacity
        self.programs, self.device = programs, device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
        with self.on_device("moving the model to the GPU"):
            pages = sequences * programs.shape(programs.capacity).sequence_pages
            self.state = GpuState(model, pages, device, sequences)
        self.longest = max(1, int(LONGEST_LAUNCH * SLOW_BANDWIDTH / model.tape.streamed_bytes))
        self.building = Building()

    @contextmanager
    def on_device(self, doing: str) -> Iterator[None]:
        """The backend's stream, and with it its device, as the current ones; what fails within is told in one line."""
        with one_line(doing, TritonError), torch.cuda.stream(self.stream):
            yield

    def making(self, make: Callable[[], GpuProgram]) -> Callable[[], GpuProgram]:
        """`make`, by the thread that builds: on the device, with its errors told."""

        def made() -> GpuProgram:
            with self.on_device("making a program"):
                return make()

        return made

    def program(self, place: int, tail: bool = False) -> Future[GpuProgram]:
        """The program of one bucket, or its tail, being made since it was first asked for; the kernel is there already."""
        return self.building.get((place, tail), self.making(lambda: GpuProgram(self.programs.program(place, tail), self.state)))
