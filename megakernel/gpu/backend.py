"""The engine's backend on a Hopper GPU: launches of a few tokens each, the next one under way while the last is read.

It has one column: one sequence is decoded, others wait their turn.  A prompt is read by prefill, all but what the KV cache
holds of it, a chunk a launch; its tail then draws the first token.  Without a prefill, the prompt's tokens are decoded like all
others.

The model's one kernel is compiled before the backend is ready.  Programs of the context buckets are moved to the GPU, and made
where that has not been done ahead, by one thread in the background, in the order in which a request will need them.  Whatever
touches the GPU, in either thread, does so on the backend's device and stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from megakernel.backend import sampling_state, shared_length
from megakernel.errors import NotNumbers
from megakernel.gpu.base import OnGpu
from megakernel.gpu.columns import ColumnFlight
from megakernel.gpu.control import Outcome
from megakernel.gpu.errors import KernelFault
from megakernel.gpu.machine import Flight, GpuProgram, GpuState
from megakernel.options import Sizes
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms

CHUNK = 16  # tokens a launch: a token reaches the host at most two launches after it was chosen
FLIGHTS = 2  # launches under way


class Prefill(Protocol):
    """Reads prompts, on the state that it was made for."""

    @property
    def chunk(self) -> int:
        """Tokens that are read at a time at most."""

    def launch(self, start: int, stop: int) -> None:
        """Compute the tokens at positions `start` to `stop` of the state, where all positions before are in the cache.

        Enqueued on the current stream: their keys and values of all layers, and in `hidden` the residual stream that enters the
        last layer at the last of them.
        """


class Reading:
    """A chunk of a prompt under way, up to position `stop`; enqueued when it is made."""

    def __init__(self, prefill: Prefill, start: int, stop: int) -> None:
        prefill.launch(start, stop)
        self.stop = stop
        self.landed = torch.cuda.Event()
        self.landed.record()


class GpuBackend(OnGpu):
    """See `megakernel.backend.Backend`.  `prefill` makes what reads prompts, of the state, the kernel's sizes and
    the number of SMs.

    What the cache is known to hold are the first `position` tokens of the sequence in the column, or of the last one that was:
    keys and values of launches that have landed.  So that it is true whenever an interrupt comes, a sequence takes the column
    before it writes a row anew, and its position is raised after the launch that wrote it.
    """

    columns = 1

    def __init__(
        self,
        model: PackedModel,
        programs: BucketPrograms,
        device: torch.device,
        prefill: Callable[[GpuState, Sizes, int], Prefill] | None = None,
    ) -> None:
        super().__init__(model, programs, device)
        self.flights: deque[Flight | Reading | ColumnFlight] = deque()
        self.sequence = Sequence([], 0, SamplingParams())  # in the column, or the last one that was: here none
        self.taken = False  # whether it is there still
        # Positions: up to where prefill has been enqueued, the next to be decoded, the one behind the last.
        self.read = self.position = self.end = 0
        self.stopped = False
        self.settled = False  # whether all that was enqueued has landed well, since when nothing was
        # Of the last token landed, with the column that chose it; its logits are still there.
        self.last_program: GpuProgram | None = None
        self.last_column = 0
        with self.on_device("compiling the kernel"):
            first = self.program(0).result()
            first.compile()
            self.prefill = None if prefill is None else prefill(self.state, first.sizes, programs.sms)

    def join(self, sequence: Sequence) -> bool:
        if self.taken:
            return False
        with self.on_device("starting a request"):
            self.begin(sequence)
        self.taken = True
        return True

    def begin(self, sequence: Sequence) -> None:
        """`join`, on the device."""
        self.abandon()
        before, prompt, sampling = self.sequence, sequence.prompt, sequence.sampling
        # The last token is computed in any case: its logits are asked for.
        kept = shared_length(before.tokens, prompt, min(before.position, len(prompt) - 1)) if sequence.reuse else 0
        sequence.kept = sequence.position = kept
        self.sequence = sequence
        self.state.start(prompt, sampling_state(sampling), sampling.stop_token_ids, kept)
        self.read, self.position, self.end, self.stopped = kept, kept, sequence.rows, False
        for place, tail in self.wanted():
            self.program(place, tail)

    def leave(self, sequence: Sequence) -> None:
        if self.sequence is sequence:
            self.taken = False

    def wanted(self) -> Iterator[tuple[int, bool]]:
        """The programs of the request that begins, and whether the tail of each, in the order in which they will be needed."""
        first, length = self.position, len(self.sequence.prompt)
        if self.prefill is not None:
            yield self.programs.place(length - 1), True
            first = length
        if first < self.end:
            yield from ((place, False) for place in range(self.programs.place(first), self.programs.place(self.end - 1) + 1))

    def decode(self, count: int) -> None:
        with self.on_device("decoding"):
            while self.room():
                self.take_off()
            self.land()

    def logits(self, sequence: Sequence) -> torch.Tensor:
        if self.last_program is None or self.sequence is not sequence:
            raise RuntimeError("its logits are no longer there: another request has been asked for since")
        with self.on_device("reading logits"):
            return self.last_program.logits(self.last_column)

    def close(self) -> None:
        with self.on_device("closing"):
            self.abandon()
        self.programs.close()
        self.building.close()
        self.last_program = self.prefill = None
        del self.state
        torch.cuda.empty_cache()

    def read_prompt(self, prefill: Prefill) -> None:
        """Enqueue the next chunk of the prompt, or after the last one the tail, which draws the first token."""
        length = len(self.sequence.prompt)
        if self.read < length:
            stop = min(self.read + prefill.chunk, length)
            self.flights.append(Reading(prefill, self.read, stop))
            self.read = stop
            return
        last = length - 1
        self.flights.append(self.program(self.programs.place(last), tail=True).result().launch(last, 1))
        self.position = length

    def room(self) -> bool:
        """Whether another launch may be enqueued."""
        return len(self.flights) < FLIGHTS and self.position < self.end and not self.stopped

    def take_off(self) -> None:
        """Enqueue the next launch: the prompt, in long ones that end with it, then a few tokens at a time."""
        self.settled = False
        length = len(self.sequence.prompt)
        in_prompt = self.position < length
        if in_prompt and self.prefill is not None:
            self.read_prompt(self.prefill)
            return
        end = length if in_prompt else self.position + CHUNK
        place, end = self.programs.cut(self.position, min(end, self.position + self.longest, self.end))
        self.flights.append(self.program(place).result().launch(self.position, end - self.position))
        self.position = end

    def land(self) -> None:
        """Wait for the oldest launch and take its tokens; after a fault the GPU is made usable again first."""
        try:
            self.take_in(self.flights.popleft())
        except KernelFault:
            self.recover()
            raise
        except NotNumbers:
            self.sequence.position = 0  # nothing of it is to be reused
            raise
        self.settled = not self.flights

    def take_in(self, flight: Flight | Reading | ColumnFlight) -> None:
        """Wait for a launch and give the sequence what came of it."""
        sequence = self.sequence
        if isinstance(flight, Reading):
            flight.landed.synchronize()
            sequence.position = flight.stop
        elif isinstance(flight, Flight):
            chosen = flight.land()
            if chosen:
                self.last_program, self.last_column = flight.program, 0
            self.stopped = self.stopped or len(chosen) < flight.tokens
            before = max(0, len(sequence.prompt) - 1 - flight.position)  # tokens of the prompt itself
            sequence.steps += len(chosen[before:])
            sequence.take(chosen[before:])
            if chosen:
                sequence.position = flight.position + len(chosen)

    def abandon(self) -> None:
        """Let the launches under way end and drop what they chose.

        But for `settled`, nothing here relies on what the host noted of them: an interrupt may have come at any moment.
        """
        if not self.settled:
            self.flights.clear()
            torch.cuda.synchronize(self.state.device)
            if Outcome(self.state.control.cpu().numpy()).faulty:
                self.recover()
            self.building.resume()
        self.building.renew()
        self.settled = True

    def recover(self) -> None:
        """After a fault: no launch under way, counters and cache as new."""
        self.flights.clear()
        self.sequence.position = 0
        torch.cuda.synchronize(self.state.device)
        self.state.cache.zero_()
        self.building.reset()
