"""The engine's backend on the CPU: one virtual machine for every context bucket, all on one decode state."""

from __future__ import annotations

import torch

from megakernel.backend import sampling_state
from megakernel.sequence import Sequence
from megakernel.vm.state import DecodeState
from megakernel.vm.vm import Vm
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms


class VmBackend:
    """See `megakernel.backend.Backend`.  `seed` draws the order in which the SMs take their steps.  Where `programs` have
    several columns, the sequence's other columns are drafts.

    It has one column, reads a prompt token by token, as the specification does, and keeps nothing for the next sequence.
    """

    name = "vm"
    columns = 1

    def __init__(self, model: PackedModel, programs: BucketPrograms, seed: int = 0) -> None:
        if model.capacity < programs.capacity:
            raise ValueError(f"the model is packed for {model.capacity} positions, the programs for {programs.capacity}")
        self.config, self.capacity = model.config, programs.capacity
        self.model, self.programs, self.seed = model, programs, seed
        self.state = DecodeState(programs.shape(programs.capacity))
        self.machines: dict[int, Vm] = {}
        self.sequence: Sequence | None = None

    def join(self, sequence: Sequence) -> bool:
        if self.sequence is not None:
            return False
        self.state.start(sequence.prompt, sampling_state(sequence.sampling), sequence.sampling.stop_token_ids)
        self.state.end = sequence.rows
        self.sequence = sequence
        return True

    def leave(self, sequence: Sequence) -> None:
        if self.sequence is sequence:
            self.sequence = None

    def decode(self, count: int) -> None:
        state, sequence = self.state, self.sequence
        if sequence is None:
            raise RuntimeError("no sequence has joined")
        known = len(state.tokens)
        end = known - 1 + min(count, sequence.left)  # the token after position p is number p + 1
        while state.position < end and not state.stopped:
            place, stop = self.programs.cut(state.position, end)
            before = len(state.tokens)
            steps = self.machine(place).launch(stop - state.position if self.programs.depth == 1 else 1)
            sequence.steps += min(steps, len(state.tokens) - before)  # those of the prompt choose none
        sequence.position = state.position
        sequence.take(state.tokens[known:])

    def logits(self, sequence: Sequence) -> torch.Tensor:
        return self.last_machine.logits(self.state.last_place)

    def close(self) -> None:
        self.machines.clear()

    def machine(self, place: int) -> Vm:
        """The machine of one bucket, made when it is first needed."""
        if place not in self.machines:
            self.machines[place] = Vm(self.programs.program(place), self.model, self.state, self.seed)
        return self.machines[place]

    @property
    def last_machine(self) -> Vm:
        """The machine that decoded the last token, whose logits are still there."""
        return self.machine(self.programs.place(self.state.position - 1 - self.state.last_place))
