"""The backend of several sequences: those that decode share steps, those that begin are read by prefill between launches.

Each has a slot (`megakernel.gpu.slot`).  Launches go into one stream, in this order of what is due: prompts with their first
tokens, whoever began first, as many pieces as those that decode may be kept waiting for, then some steps of all that decode.
One that decodes alone has the program of one column, on its slot; several have the program of as many columns as reach their
slots, in which those that take no part leave their cache as it is.  Nothing of that changes a token: columns do not mix.

The host knows where every sequence stands without waiting: a step moves each on by one.  Only a sequence that joins those that
decode waits until the launches under way have landed, since a program's launches may end early, when all of their sequences
have met a stop token, and the next would count its steps from the wrong one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from instructions.dimensions import ceil_div, next_power_of_two
from megakernel.backend import sampling_state, shared_length
from megakernel.control_block import MOST_SEQUENCES, REQUEST, SEQUENCE_WORDS, SEQUENCES, Progress
from megakernel.errors import NotNumbers
from megakernel.gpu.backend import CHUNK, FLIGHTS, Prefill, Reading
from megakernel.gpu.base import SLOW_BANDWIDTH, OnGpu
from megakernel.gpu.columns import ColumnFlight, ColumnProgram
from megakernel.gpu.control import Outcome, progress_words, request_place
from megakernel.gpu.errors import KernelFault
from megakernel.gpu.machine import Flight, GpuProgram, GpuState, upload
from megakernel.gpu.slot import Slot
from megakernel.options import Sizes
from megakernel.sequence import Sequence
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms

HURRY = 4  # steps a launch while somebody's prompt waits to be read
ROOM = 8  # likewise while a slot is free, or will be once what is under way has landed
PIECES = 0.03  # seconds that pieces of prompts may take together, while others wait for their tokens
FLOPS = 6.0e14  # a second, of prefill's products
LAUNCHES = 0.001  # seconds that a piece takes at least


class SharedPrefill(Prefill, Protocol):
    """Reads prompts, of whichever state."""

    def on(self, state: GpuState) -> SharedPrefill:
        """The same for another state of the model."""


@dataclass(frozen=True, eq=False)
class Enqueued:
    """A launch under way, and whose: slots and the sequences that had them then."""

    flight: Flight | Reading | ColumnFlight
    members: tuple[tuple[Slot, Sequence], ...]


class SharingBackend(OnGpu):
    """See `megakernel.backend.Backend`.

    programs: of one column.  shared: of 2, 4, ... columns, as many as are decoded at once.  prefill: as `GpuBackend`'s.
    """

    def __init__(
        self,
        model: PackedModel,
        programs: BucketPrograms,
        shared: tuple[BucketPrograms, ...],
        device: torch.device,
        prefill: Callable[[GpuState, Sizes, int], SharedPrefill] | None = None,
    ) -> None:
        self.shared = {each.sequences: each for each in shared}
        self.columns = max(self.shared)
        super().__init__(model, programs, device, self.columns)
        self.slots = [Slot(number, self.state.alone(number)) for number in range(self.columns)]
        shape = programs.shape(self.capacity)
        self.weight_bytes = model.tape.streamed_bytes
        self.page_positions, self.head_pages = shape.page_positions, shape.head_pages
        self.slices = [programs.shape(size).slices for size in programs.sizes]
        self.flights: deque[Enqueued] = deque()
        self.moment = 0  # counts those that have joined or left
        self.placed: tuple[object, ...] = ()  # where the GPU knows the sequences to stand and to end, by its own steps
        self.kept_waiting = 0.0  # seconds that pieces take which were enqueued since the last steps
        self.settled = False  # whether nothing has been interrupted
        self.prefills: list[SharedPrefill] = []
        with self.on_device("compiling the kernels"):
            for program in (self.program(0).result(), *(self.column_program(count, 0).result() for count in self.shared)):
                program.compile()
            if prefill is not None:
                first = prefill(self.slots[0].state, self.program(0).result().sizes, programs.sms)
                self.prefills = [first, *(first.on(slot.state) for slot in self.slots[1:])]
                piece = next_power_of_two(int(PIECES * FLOPS / self.weight_bytes) + 1) // 2
                self.piece = min(first.chunk, max(piece, 1))

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever an interrupt leaves half done within is made good before the next."""
        if not self.settled:
            self.settle()
        self.settled = False
        yield
        self.settled = True

    def settle(self) -> None:
        """Wait for all that was enqueued, whatever the host has noted of it, and take from the GPU where its counters stand."""
        self.flights.clear()
        torch.cuda.synchronize(self.device)
        states = (self.state, *(slot.state for slot in self.slots))
        if any(Outcome(state.control.cpu().numpy()).faulty for state in states):
            self.recover()
        self.building.resume()
        self.state.steps = int(self.state.control[SEQUENCES + Progress.STEPS])
        self.placed = ()

    def recover(self) -> None:
        """After a fault: no launch under way, counters and cache as new."""
        self.flights.clear()
        for slot in self.slots:
            slot.forget()
            slot.taken = False
        torch.cuda.synchronize(self.device)
        self.state.cache.zero_()
        for state in (self.state, *(slot.state for slot in self.slots)):
            state.control.zero_()
        self.state.steps, self.placed = 0, ()
        self.building.reset()

    def column_program(self, count: int, place: int) -> Future[ColumnProgram]:
        """The program of so many columns of one bucket, as `program`."""
        key = count, place, False
        return self.building.get(key, self.making(lambda: ColumnProgram(self.shared[count].program(place), self.state)))

    def join(self, sequence: Sequence) -> bool:
        free = [slot for slot in self.slots if not slot.taken]
        if not free:
            return False
        with self.on_device("starting a request"), self.all_or_nothing():
            kept, source = self.most_shared(free, sequence)
            unwanted = source if kept == len(source.known) > 0 else min(free, key=lambda each: each.used)
            slot = free[0]  # the first that is free, so that few columns reach all
            if unwanted is not slot and unwanted is source:
                self.exchange(slot, unwanted)
                source = slot
            elif unwanted is not slot:
                self.move(slot, unwanted)
            self.moment += 1
            slot.forget()
            if kept and source is not slot:
                self.rows(slot, kept).copy_(self.rows(source, kept))
            slot.state.start(sequence.prompt, sampling_state(sequence.sampling), sequence.sampling.stop_token_ids, kept)
            place = request_place(slot.number)
            self.state.control[place : place + REQUEST].copy_(slot.state.control[:REQUEST])
            slot.begin(sequence, kept, self.moment)
            self.foresee(slot)
        return True

    def most_shared(self, slots: list[Slot], sequence: Sequence) -> tuple[int, Slot]:
        """How much of a prompt the cache holds at most in one of these slots, and the first in which it does.

        The last token is computed in any case: its logits are asked for.
        """
        prompt, most = sequence.prompt, len(sequence.prompt) - 1 if sequence.reuse else 0
        return max(((shared_length(slot.known, prompt, most), slot) for slot in slots), key=lambda found: found[0])

    def rows(self, slot: Slot, count: int) -> torch.Tensor:
        """The pages of a slot's cache that hold its first positions, [heads, pages, elements]."""
        pages = slot.state.cache
        return pages.view(-1, self.head_pages, pages.shape[1])[:, : ceil_div(count, self.page_positions)]

    def exchange(self, one: Slot, other: Slot) -> None:
        """What the cache holds in two slots that are free."""
        counts = len(one.known), len(other.known)
        held = one.forget(), other.forget()
        rows = self.rows(one, counts[0]).clone()
        self.rows(one, counts[1]).copy_(self.rows(other, counts[1]))
        self.rows(other, counts[0]).copy_(rows)
        other.sequence, one.sequence = held
        one.used, other.used = other.used, one.used

    def move(self, one: Slot, other: Slot) -> None:
        """What the cache holds in a slot that is free to another, whose own is given up."""
        count, held = len(one.known), one.forget()
        other.forget()
        if count:
            self.rows(other, count).copy_(self.rows(one, count))
        other.sequence, other.used = held, one.used

    def foresee(self, slot: Slot) -> None:
        """Ask for the programs that a slot's sequence will need, in this order."""
        first, length = slot.position, len(slot.sequence.prompt)
        if self.prefills:
            self.program(self.programs.place(length - 1), tail=True)
            first = length
        if first >= slot.end:
            return
        places = range(self.programs.place(first), self.programs.place(slot.end - 1) + 1)
        taken = [each.number for each in self.slots if each.taken]
        for place in places:
            if len(taken) > 1:
                self.column_program(self.reach(max(taken)), place)
            self.program(place)

    def reach(self, number: int) -> int:
        """The columns of the smallest program that has a slot."""
        return min(count for count in self.shared if count > number)

    def leave(self, sequence: Sequence) -> None:
        for slot in self.slots:
            if slot.sequence is sequence:
                self.moment += 1
                slot.taken, slot.used = False, self.moment

    def decode(self, count: int) -> None:
        with self.on_device("decoding"), self.all_or_nothing():
            moved = False
            while not moved:  # a launch for those alone who have left meanwhile moves nobody
                while len(self.flights) < FLIGHTS and self.take_off():
                    pass
                if not self.flights:
                    break
                moved = self.land()

    def take_off(self) -> bool:
        """Enqueue what is due next; False where nothing can be."""
        readers = sorted((slot for slot in self.slots if slot.going and self.reads(slot)), key=lambda slot: slot.used)
        group = [slot for slot in self.slots if slot.going and not self.reads(slot)]
        if readers and (not group or self.may_read(readers[0])):
            self.read_prompt(readers[0])
            return True
        room = not all(slot.going for slot in self.slots)  # for whoever comes next, who waits for two launches at most
        if group and self.steps(group, HURRY if readers else ROOM if room else CHUNK):
            return True
        if readers:
            self.read_prompt(readers[0])
        return bool(readers)

    def reads(self, slot: Slot) -> bool:
        """Whether what is next of a slot is prefill's business."""
        return bool(self.prefills) and slot.in_prompt

    def next_piece(self, slot: Slot) -> tuple[int, float]:
        """Up to where the next piece of a prompt goes, and the seconds that it takes at most, a tail after it included; none
        where all has been read."""
        stop = min(slot.read + self.piece, len(slot.sequence.prompt))
        seconds = self.weight_bytes * ((stop - slot.read) / FLOPS + 1 / SLOW_BANDWIDTH)
        return stop, max(LAUNCHES, seconds) if stop > slot.read else 0.0

    def may_read(self, slot: Slot) -> bool:
        """Whether those that decode can wait for what is next of a prompt."""
        _, seconds = self.next_piece(slot)
        return not (seconds and self.kept_waiting) or self.kept_waiting + seconds <= PIECES

    def read_prompt(self, slot: Slot) -> None:
        """Enqueue the next piece of a prompt, or after the last one the tail, which draws the first token."""
        length, state = len(slot.sequence.prompt), slot.state
        if slot.read == slot.sequence.kept:
            self.look_again(slot)
        if slot.read < length:
            stop, seconds = self.next_piece(slot)
            self.kept_waiting += seconds
            reading = Reading(self.prefills[slot.number], slot.read, stop)
            self.flights.append(Enqueued(reading, ((slot, slot.sequence),)))
            slot.read = stop
            return
        program = self.program(self.programs.place(length - 1), tail=True).result()
        self.enqueue(program.launch(length - 1, 1, state), [slot])
        slot.position = length

    def look_again(self, slot: Slot) -> None:
        """Copy what another slot holds of a prompt of which nothing has been read yet: it may have been read there since."""
        sequence = slot.sequence
        kept, source = self.most_shared([each for each in self.slots if each is not slot], sequence)
        if kept <= sequence.kept:
            return
        sequence.position = 0
        self.rows(slot, kept).copy_(self.rows(source, kept))
        slot.read = slot.position = sequence.kept = sequence.position = kept

    def steps(self, group: list[Slot], most: int) -> bool:
        """Enqueue steps of all that decode; False where that must wait for launches under way."""
        program = self.program_of(group)
        wanted = {(slot, slot.sequence) for slot in group}
        before = [each for each in self.flights if self.program_under_way(each) is program]
        if any(not wanted <= set(each.members) for each in before) or (program.worn and self.flights):
            return False
        if program.worn:
            program.reset()
        ends = [self.programs.cut(slot.position, slot.end)[1] for slot in group]
        steps = min(most, self.longest, max(end - slot.position for slot, end in zip(group, ends, strict=True)))
        if isinstance(program, ColumnProgram):
            self.place(program, group, ends)
            firsts = [slot.position for slot in self.slots[: program.program.shape.sequences]]
            flight: Flight | ColumnFlight = program.launch_steps(steps, firsts)
        else:
            self.placed = ()
            flight = program.launch(group[0].position, steps, group[0].state)
        self.enqueue(flight, group)
        for slot, end in zip(group, ends, strict=True):
            slot.position = min(slot.position + steps, end)
        self.kept_waiting = 0.0
        return True

    def program_of(self, group: list[Slot]) -> GpuProgram:
        """The program that decodes the next positions of all of them."""
        place = max(self.programs.place(slot.position) for slot in group)
        if len(group) == 1:
            return self.program(place).result()
        return self.column_program(self.reach(max(slot.number for slot in group)), place).result()

    def program_under_way(self, enqueued: Enqueued) -> GpuProgram | None:
        """Of a launch."""
        return None if isinstance(enqueued.flight, Reading) else enqueued.flight.program

    def place(self, program: ColumnProgram, group: list[Slot], ends: list[int]) -> None:
        """Tell every sequence of a program where it stands, unless the GPU knows by its own steps."""
        words = np.tile(progress_words(0, 0, 1), (MOST_SEQUENCES, 1))
        for slot, end in zip(group, ends, strict=True):
            words[slot.number] = progress_words(slot.position, end, self.slices[self.programs.place(slot.position)])
        placed = tuple((slot.number, id(slot.sequence), *words[slot.number, 1:]) for slot in group)
        if placed != self.placed:
            rows = self.state.control[SEQUENCES:].view(MOST_SEQUENCES, SEQUENCE_WORDS)
            upload((rows[:, : words.shape[1]], words))
            self.placed = placed

    def enqueue(self, flight: Flight | ColumnFlight, group: list[Slot]) -> None:
        """Note a launch under way."""
        self.flights.append(Enqueued(flight, tuple((slot, slot.sequence) for slot in group)))

    def land(self) -> bool:
        """Wait for the oldest launch and take its tokens; whether that moved anybody on.  After a fault the GPU is made usable
        again first."""
        enqueued = self.flights.popleft()
        members = [(slot, one) for slot, one in enqueued.members if slot.sequence is one and not one.ended]
        flight = enqueued.flight
        try:
            if isinstance(flight, Reading):
                flight.landed.synchronize()
                for _, sequence in members:
                    sequence.position = flight.stop
            elif isinstance(flight, Flight):
                self.land_alone(flight, members)
            else:
                self.land_shared(flight, members)
        except KernelFault:
            self.recover()
            self.settled = True
            raise
        return bool(members)

    def land_alone(self, flight: Flight, members: list[tuple[Slot, Sequence]]) -> None:
        """The tokens of a launch of one column."""
        error: NotNumbers | None = None
        try:
            chosen = flight.land()
        except NotNumbers as found:
            error = found
        for slot, sequence in members:
            if error is not None:
                self.fail(sequence, error)
            else:
                self.take(sequence, flight.position, flight.position + len(chosen), chosen)
                slot.last = flight.program, flight.program.epoch

    def land_shared(self, flight: ColumnFlight, members: list[tuple[Slot, Sequence]]) -> None:
        """The tokens of a launch of several columns."""
        _, landed = flight.land()
        for slot, sequence in members:
            found = landed[slot.number]
            if found.numberless:
                self.fail(sequence, NotNumbers(found.position - 1))
                continue
            slot.last = None
            self.take(sequence, flight.firsts[slot.number], found.position, found.tokens)

    def take(self, sequence: Sequence, first: int, stop: int, tokens: list[int]) -> None:
        """Give a sequence what was chosen after positions `first` to `stop`; within the prompt, the prompt's own stands."""
        before = max(0, len(sequence.prompt) - 1 - first)
        sequence.steps += len(tokens[before:])
        sequence.take(tokens[before:])
        sequence.position = stop

    def fail(self, sequence: Sequence, error: NotNumbers) -> None:
        """End a sequence whose logits are no numbers; nothing of it is to be reused."""
        sequence.fail(error)
        sequence.position = 0

    def logits(self, sequence: Sequence) -> torch.Tensor:
        for slot in self.slots:
            if slot.sequence is sequence and slot.last is not None:
                program, epoch = slot.last
                if (program.epoch, program.enqueued) == (epoch, 0):
                    with self.on_device("reading logits"):
                        return program.logits()
        raise RuntimeError("its logits are no longer there: others have been decoded with it or since")

    def close(self) -> None:
        with self.on_device("closing"):
            self.settle()
        for programs in (self.programs, *self.shared.values()):
            programs.close()
        self.building.close()
        self.prefills = []
        self.slots = []
        del self.state
        torch.cuda.empty_cache()
