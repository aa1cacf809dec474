"""The engine's backend on the CPU: one virtual machine for every context bucket, all on one decode state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megakernel.backend import Report, sampling_state
from megakernel.request import SamplingParams
from megakernel.vm.state import DecodeState
from megakernel.vm.vm import Vm
from models.packed import PackedModel
from scheduler.buckets import BucketPrograms


class VmBackend:
    """See `megakernel.backend.Backend`.  `seed` draws the order in which the SMs take their steps.  Where `programs` have
    several
    columns, the sequence's other columns are drafts, and `steps` counts those of the request.

    It reads a prompt token by token, as the specification does, and keeps nothing from one sequence to the next.
    """

    name = "vm"
    kept = 0

    def __init__(self, model: PackedModel, programs: BucketPrograms, seed: int = 0) -> None:
        if model.capacity < programs.capacity:
            raise ValueError(f"the model is packed for {model.capacity} positions, the programs for {programs.capacity}")
        self.config, self.capacity = model.config, programs.capacity
        self.model, self.programs, self.seed = model, programs, seed
        self.state = DecodeState(programs.shape(programs.capacity))
        self.machines: dict[int, Vm] = {}
        self.steps = 0
        self.ready: list[int] = []

    def start(
        self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool = True, report: Report | None = None
    ) -> None:
        self.state.start(prompt, sampling_state(sampling), sampling.stop_token_ids)
        self.state.end = len(prompt) - 1 + limit
        self.steps, self.ready = 0, []

    def decode(self, count: int) -> list[int]:
        if self.programs.depth == 1:
            return self.decode_one(count)
        state = self.state
        while len(self.ready) < count and not state.stopped and state.position < state.end:
            known = len(state.tokens)
            made = self.machine(self.programs.place(state.position)).launch(1)
            self.steps += made if len(state.tokens) > known else 0
            self.ready += state.tokens[known:]
        tokens, self.ready = self.ready[:count], self.ready[count:]
        return tokens

    def decode_one(self, count: int) -> list[int]:
        """`decode` of a single column."""
        state, known = self.state, len(self.state.tokens)
        end = known - 1 + count  # the token after position p is number p + 1
        while state.position < end and not state.stopped:
            place, stop = self.programs.cut(state.position, end)
            self.machine(place).launch(stop - state.position)
        self.steps += len(state.tokens) - known
        return state.tokens[known:]

    def logits(self) -> torch.Tensor:
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
