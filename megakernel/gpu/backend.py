"""The engine's backend on a Hopper GPU: launches of a few tokens each, the next one under way while the last is read.

A prompt is read by prefill, all but what the KV cache holds of it; its tail then draws the first token.  Without a prefill, the
prompt's tokens are decoded like all others.

The model's one kernel is compiled before the backend is ready.  Programs of the context buckets are moved to the GPU, and made
where that has not been done ahead, by one thread in the background, in the order in which a request will need them.  Whatever
touches the GPU, in either thread, does so on the backend's device and stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from triton.errors import TritonError

from megakernel.backend import Report, sampling_state, shared_length
from megakernel.errors import one_line
from megakernel.gpu.control import Outcome
from megakernel.gpu.errors import KernelFault
from megakernel.gpu.machine import Flight, GpuProgram, GpuState
from megakernel.options import Sizes
from megakernel.request import SamplingParams
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms

CHUNK = 16  # tokens a launch: a token reaches the host at most two launches after it was chosen
FLIGHTS = 2  # launches under way
LONGEST_LAUNCH = 0.25  # seconds, so that an interrupt is answered soon
SLOW_BANDWIDTH = 2.0e12  # bytes a second, to bound a launch's time from above


class Prefill(Protocol):
    """Reads prompts, on the state that it was made for."""

    def launch(self, start: int, stop: int, report: Report | None) -> None:
        """Compute the tokens at positions `start` to `stop` of the state, where all positions before are in the cache.

        Enqueued on the current stream: their keys and values of all layers, and in `hidden` the residual stream that enters the
        last layer at the last of them.  May block, so that no more is under way than a fraction of a second takes; then
        `report` is told how many positions of the sequence have been computed, those before `start` included.
        """


class GpuBackend:
    """See `megakernel.backend.Backend`.  `prefill` makes what reads prompts, of the state, the kernel's sizes and
    the number of SMs.

    What the cache is known to hold is `sequence[:cached]`: keys and values of launches that have landed.  So that it is true
    whenever an interrupt comes, `cached` is lowered before a row is written anew, and raised after the launch that wrote it.
    """

    name = "gpu"

    def __init__(
        self,
        model: PackedModel,
        programs: BucketPrograms,
        device: torch.device,
        prefill: Callable[[GpuState, Sizes, int], Prefill] | None = None,
    ) -> None:
        self.config, self.capacity = model.config, programs.capacity
        self.programs, self.device = programs, device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
        with self.on_device("moving the model to the GPU"):
            self.state = GpuState(model, programs.shape(programs.capacity).cache_pages, device)
        step = model.tape.streamed_bytes / SLOW_BANDWIDTH
        self.longest = max(1, int(LONGEST_LAUNCH / step))
        self.builder = ThreadPoolExecutor(1, "megakernel-build")
        self.built: dict[tuple[int, bool], Future[GpuProgram]] = {}
        self.flights: deque[Flight] = deque()
        self.ready: list[int] = []
        self.sequence: list[int] = []  # the prompt, and what has been chosen since
        self.cached = self.kept = 0
        self.prompt_length = self.position = self.end = 0
        self.steps = 0  # of the request, that chose a token
        self.report: Report | None = None
        self.stopped = False
        self.settled = False  # whether all that was enqueued has landed well, since when nothing was
        self.last_program: GpuProgram | None = None  # of the last token landed; its logits are still there
        with self.on_device("compiling the kernel"):
            first = self.program(0).result()
            first.compile()
            self.prefill = None if prefill is None else prefill(self.state, first.sizes, programs.sms)

    @contextmanager
    def on_device(self, doing: str) -> Iterator[None]:
        """The backend's stream, and with it its device, as the current ones; what fails within is told in one line."""
        with one_line(doing, TritonError), torch.cuda.stream(self.stream):
            yield

    def start(
        self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool = True, report: Report | None = None
    ) -> None:
        with self.on_device("starting a request"):
            self.begin(list(prompt), limit, sampling, reuse)
        self.report = report

    def begin(self, prompt: list[int], limit: int, sampling: SamplingParams, reuse: bool) -> None:
        """`start`, on the device."""
        self.abandon()
        # The last token is computed in any case: its logits are asked for.
        kept = shared_length(self.sequence[: self.cached], prompt[:-1]) if reuse else 0
        self.cached = kept
        self.sequence = prompt
        self.state.start(prompt, sampling_state(sampling), sampling.stop_token_ids, kept)
        self.ready.clear()
        self.prompt_length, self.position, self.stopped = len(prompt), kept, False
        self.kept, self.end, self.steps = kept, len(prompt) - 1 + limit, 0
        for place, tail in self.wanted():
            self.program(place, tail)

    def wanted(self) -> Iterator[tuple[int, bool]]:
        """The programs of the request that begins, and whether the tail of each, in the order in which they will be needed."""
        first = self.position
        if self.prefill is not None:
            yield self.programs.place(self.prompt_length - 1), True
            first = self.prompt_length
        if first < self.end:
            yield from ((place, False) for place in range(self.programs.place(first), self.programs.place(self.end - 1) + 1))

    def decode(self, count: int) -> list[int]:
        with self.on_device("decoding"):
            while not self.ready:
                while self.room():
                    self.take_off()
                self.land()
        tokens, self.ready = self.ready[:count], self.ready[count:]
        return tokens

    def logits(self) -> torch.Tensor:
        if self.last_program is None:
            raise RuntimeError("no token has been decoded yet")
        with self.on_device("reading logits"):
            return self.last_program.logits()

    def close(self) -> None:
        with self.on_device("closing"):
            self.abandon()
        self.programs.close()
        self.builder.shutdown(wait=True, cancel_futures=True)
        self.built.clear()
        self.last_program = self.prefill = None
        del self.state
        torch.cuda.empty_cache()

    def program(self, place: int, tail: bool = False) -> Future[GpuProgram]:
        """The program of one bucket, or its tail, being built since it was first asked for; one that could not be built is
        tried again."""
        known = self.built.get((place, tail))
        if known is None or (known.done() and known.exception() is not None):
            self.built[place, tail] = self.builder.submit(self.build, place, tail)
        return self.built[place, tail]

    def build(self, place: int, tail: bool) -> GpuProgram:
        """Schedule one bucket's program, or its tail; the kernel is there already."""
        with self.on_device("making a program"):
            return GpuProgram(self.programs.program(place, tail), self.state)

    def read_prompt(self, prefill: Prefill) -> None:
        """Enqueue what is not kept of the prompt, and its tail, which draws the first token."""
        last = self.prompt_length - 1
        prefill.launch(self.position, self.prompt_length, self.report)
        self.flights.append(self.program(self.programs.place(last), tail=True).result().launch(last, 1))
        self.position = self.prompt_length

    def room(self) -> bool:
        """Whether another launch may be enqueued."""
        return len(self.flights) < FLIGHTS and self.position < self.end and not self.stopped

    def take_off(self) -> None:
        """Enqueue the next launch: the prompt, in long ones that end with it, then a few tokens at a time."""
        self.settled = False
        in_prompt = self.position < self.prompt_length
        if in_prompt and self.prefill is not None:
            self.read_prompt(self.prefill)
            return
        end = self.prompt_length if in_prompt else self.position + CHUNK
        place, end = self.programs.cut(self.position, min(end, self.position + self.longest, self.end))
        self.flights.append(self.program(place).result().launch(self.position, end - self.position))
        self.position = end

    def land(self) -> None:
        """Wait for the oldest launch and take its tokens; after a fault the GPU is made usable again first."""
        flight = self.flights.popleft()
        try:
            chosen = flight.land()
        except KernelFault:
            self.recover()
            raise
        if chosen:
            self.last_program = flight.program
        self.stopped = self.stopped or len(chosen) < flight.tokens
        before = max(0, self.prompt_length - 1 - flight.position)  # tokens of the prompt itself
        self.ready.extend(chosen[before:])
        self.sequence.extend(chosen[before:])
        if chosen:
            self.cached = flight.position + len(chosen)
        self.settled = not self.flights

    def abandon(self) -> None:
        """Let the launches under way end and drop what they chose.

        But for `settled`, nothing here relies on what the host noted of them: an interrupt may have come at any moment.
        """
        if not self.settled:
            self.flights.clear()
            torch.cuda.synchronize(self.state.device)
            if Outcome(self.state.control.cpu().numpy()).faulty:
                self.recover()
            for program in self.programs_built():
                if program.used:
                    program.resume()
        for program in self.programs_built():
            if program.worn:
                program.reset()
        self.settled = True

    def recover(self) -> None:
        """After a fault: no launch under way, counters and cache as new."""
        self.flights.clear()
        self.cached = 0
        torch.cuda.synchronize(self.state.device)
        self.state.cache.zero_()
        for program in self.programs_built():
            program.reset()

    def programs_built(self) -> list[GpuProgram]:
        """The programs that are there already."""
        return [future.result() for future in self.built.values() if future.done() and future.exception() is None]
