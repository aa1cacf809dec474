"""The CPU virtual machine: runs a serialised program as the kernel does, in any order of steps the waits allow.

It is the executable specification of the machine protocol.  Every SM has a loader and a consumer that walk its queue
independently, for many tokens; an `Interleaving` decides who goes next.  Nothing is trusted: values carry their epoch,
pages their owner, and a program that breaks a rule raises `VmError` with the instruction and the SM.

It knows no engine: it is told how many tokens to decode, on a state that other programs may share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from instructions.base import Region
from instructions.codec import MAX_WAITS
from instructions.shape import Shape
from megakernel.vm.actors import Consumer, Loader, Sm
from megakernel.vm.cells import Actor, Cell, Stuck, run_actors
from megakernel.vm.errors import Fault, VmError
from megakernel.vm.interleaving import Interleaving, RandomInterleaving
from megakernel.vm.machine import ExecutingMachine
from megakernel.vm.memory import Activations
from megakernel.vm.record import Record, decode_queue
from megakernel.vm.report import stuck_error
from megakernel.vm.ring import Ring
from megakernel.vm.sight import Sight
from megakernel.vm.state import DecodeState
from megakernel.vm.step import Step
from models.packed import PackedModel
from scheduler.program import Program


class Launch:
    """One launch of the grid: barriers and rings start fresh, counters go on."""

    def __init__(self, vm: Vm, tokens: int) -> None:
        self.shape, self.state, self.memory = vm.program.shape, vm.state, vm.memory
        self.tokens, self.start, self.epoch = tokens, vm.state.position, vm.epoch
        self.counters = vm.counters
        self.stored = Cell("instructions ended")
        self.end = vm.program.end_counter
        known = 0 <= self.end < len(self.counters)  # if not, nothing can raise it
        self.finished = self.counters[self.end] if known else Cell("tokens finished")
        cache, lengths = vm.state.cache, [len(records) for records in vm.queues]
        self.sight = Sight(lengths, len(vm.counters), self.shape.arena_elements, cache.layers, cache.rows)
        self.ready: list[Actor] = []
        self.limit = min(self.shape.bucket + 1, self.shape.capacity, vm.model.capacity)
        self.steps: list[Step] = []
        self.poisoned = -1
        self.consumers: list[Consumer] = []
        self.loaders: list[Loader] = []
        for number, records in enumerate(vm.queues):
            ring = Ring(number, vm.program.ring, vm.model.weights)
            hints = vm.hints[vm.program.starts[number] : vm.program.starts[number + 1]]
            sm = Sm(number, records, int(vm.program.uses[number]), ring, hints)
            self.loaders.append(Loader(sm, self))
            machine = ExecutingMachine(self.shape, vm.model, self.memory, self.state, self.sight)
            self.consumers.append(Consumer(sm, self, machine))

    def begin_token(self, token: int) -> None:
        """See `Grid`."""
        if self.poisoned < token:
            self.memory.poison()
            self.poisoned = token
            self.step(token)

    @property
    def over(self) -> bool:
        """See `Grid`."""
        if self.shape.columns == 1:
            return self.state.stopped
        return not any(sequence.runs(self.limit) for sequence in self.state.sequences)

    def step(self, token: int) -> Step:
        """See `Grid`."""
        if len(self.steps) == token and (not token or self.steps[-1].ended):
            self.steps.append(Step(self.shape, self.state, self.limit))
        if token >= len(self.steps):
            raise Fault(f"looks where token {token} begins before the one before it has ended")
        return self.steps[token]


class Vm:
    """A program, a packed model and a decode state; counters and epochs live as long as the machine.

    Steps are interleaved as `interleaving` says, by default in an order drawn from `seed`.  With `early`, consumers do not wait
    for hints: they look for values until these are there, as on the GPU.  A launch that ends in an error or is interrupted
    leaves the machine as new, and the state of no use until its next start.
    """

    def __init__(
        self,
        program: Program,
        model: PackedModel,
        state: DecodeState | None = None,
        seed: int = 0,
        interleaving: Interleaving | None = None,
        early: bool = False,
    ) -> None:
        self.program, self.model = program, model
        self.state = DecodeState(program.shape) if state is None else state
        self.interleaving = RandomInterleaving(seed) if interleaving is None else interleaving
        check_fit(program.shape, model, self.state)
        self.hints = program.hints if early else np.zeros((len(program.words), MAX_WAITS), dtype=bool)
        self.decoded: list[list[Record]] | None = None
        self.reset()

    def reset(self) -> None:
        """Counters and epoch zero, activations as if never written."""
        self.memory = Activations(self.program.shape)
        self.counters = [Cell(f"counter {number}") for number in range(self.program.counters)]
        self.epoch = 0

    @property
    def queues(self) -> list[list[Record]]:
        """The records of every SM; raises VmError for words that are no instruction."""
        if self.decoded is None:
            program = self.program
            if program.ring < 1 or len(program.uses) != program.sms or min(program.uses, default=0) < 0:
                raise VmError(0, 0, "header", f"a ring of {program.ring} pages and page uses {list(program.uses)}")
            self.decoded = [decode_queue(program, sm) for sm in range(program.sms)]
        return self.decoded

    @torch.inference_mode()
    def launch(self, tokens: int) -> int:
        """Decode up to `tokens` tokens, loaders running ahead across them; returns how many, fewer after a stop token.

        With several columns, up to so many steps; returns the number of steps.
        Raises ValueError where the positions do not fit the program, VmError where the program breaks a rule.
        """
        state = self.state
        if not state.tokens:
            raise ValueError("nothing to decode: the state has no prompt, call its start first")
        several = self.program.shape.columns > 1
        self.program.require_positions(state.position, 1 if several else tokens, self.model.capacity)
        launch = Launch(self, tokens)
        launch.ready.extend([*launch.loaders, *launch.consumers])
        try:
            with one_thread():
                run_actors(launch.ready, len(launch.consumers), self.interleaving)
            done = sum(step.ended for step in launch.steps)
            if done < tokens and not launch.over:
                raise VmError(0, 0, "end of the launch", f"no instruction chose the last of {tokens} tokens")
            if launch.finished.value != self.epoch + done:
                problem = f"the counter of the token's end stands at {launch.finished.value} after {self.epoch + done} tokens"
                raise VmError(0, 0, "end of the launch", problem)
        except Stuck:
            self.reset()
            raise stuck_error(self.queues, launch.consumers, launch.loaders) from None
        except BaseException:
            self.reset()
            raise
        self.epoch = launch.finished.value
        return done

    def logits(self, column: int = 0) -> torch.Tensor:
        """The logits of the last token decoded under this program, in a column, fp32 [vocab], a copy; ValueError before the
        first."""
        if not self.epoch:
            raise ValueError("no logits: this machine has decoded no token")
        region = Region("logits", 0, 0, self.program.shape.config.vocab_size)
        return self.memory.read(region, self.epoch - 1, column).clone()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: the pieces of a token are too small to share, and bits must not depend on how they were shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_fit(shape: Shape, model: PackedModel, state: DecodeState) -> None:
    """Refuse parts that were not made for each other, with a ValueError."""
    if (model.config, model.dtype.itemsize, model.tape.formats) != (shape.config, shape.itemsize, shape.formats):
        raise ValueError("the program was made for another model or weight type than the packed weights")
    cache = state.cache.shape
    if (cache.config, cache.itemsize, cache.head_pages) != (shape.config, shape.itemsize, shape.head_pages) or (
        cache.sequences < shape.sequences
    ):
        raise ValueError("the program was made for another KV cache than the state's")
