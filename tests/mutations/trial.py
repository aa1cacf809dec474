"""A mutant on trial: run on the virtual machine under many interleavings, against the program it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from random import Random

import torch

from instructions.shape import Shape
from megakernel.vm import DecodeState, Vm, VmError
from megakernel.vm.interleaving import Interleaving, RandomInterleaving, adversaries, starving
from scheduler.program import Program
from tests.mutations.programs import Base

LAUNCHES = (3, 1)  # tokens of each launch: across tokens, and across launches
NAMED_ORDERS = 4  # adversaries that starve no particular SM


def begun_state(shape: Shape, random: Random) -> DecodeState:
    """Sequences in their midst: a cache filled up to random positions with made-up rows, their last prompt tokens, drafts."""
    state = DecodeState(shape)
    for number, sequence in enumerate(state.sequences):
        position = random.randrange(shape.bucket - sum(LAUNCHES) * shape.depth)
        state.join(number, [random.randrange(shape.config.vocab_size) for _ in range(position + 1)])
        sequence.position = position
        sequence.drafts = sequence.source(sequence.tokens, shape.depth - 1)
        state.cache.last[:, state.cache.rows_of(number)] = position - 1
    generator = torch.Generator().manual_seed(state.position)
    state.cache.pages.copy_(torch.randn(state.cache.pages.shape, generator=generator))
    state.hidden = torch.randn(shape.config.hidden_size, generator=generator)
    return state


class Outcome:
    """What a run left: tokens, the last logits, the cache, bit for bit."""

    def __init__(self, state: DecodeState, logits: torch.Tensor) -> None:
        self.tokens, self.logits = [token for sequence in state.sequences for token in sequence.tokens], logits
        self.cache = state.cache.pages.view(torch.int16 if state.cache.pages.dtype == torch.bfloat16 else torch.int32)

    def difference(self, other: Outcome) -> str | None:
        """Where two runs differ, or None."""
        if self.tokens != other.tokens:
            return f"tokens {self.tokens[-sum(LAUNCHES) :]}, they should be {other.tokens[-sum(LAUNCHES) :]}"
        if not torch.equal(self.logits, other.logits):
            return "other logits"
        return None if torch.equal(self.cache, other.cache) else "another KV cache"


def run(program: Program, base: Base, state: DecodeState, interleaving: Interleaving, early: bool = False) -> Outcome:
    """All launches from a copy of a state; raises VmError for a fault.  `early` as of the machine."""
    state = deepcopy(state)
    vm = Vm(program, base.model, state, interleaving=interleaving, early=early)
    for tokens in LAUNCHES:
        vm.launch(tokens)
    return Outcome(state, vm.logits())


def orders(sms: int, random: Random, runs: int) -> Iterator[Interleaving]:
    """The named adversaries, then starved SMs and random orders in turn, `runs` in all."""
    yield from adversaries(sms)[: min(NAMED_ORDERS, runs)]
    for number in range(runs - NAMED_ORDERS):
        yield starving(random.randrange(sms)) if number % 2 else RandomInterleaving(random.randrange(2**32))


class Trial:
    """Holds what the true program makes of a random state within a bucket, by default its own."""

    def __init__(self, base: Base, random: Random, bucket: int | None = None) -> None:
        self.base, self.random = base, random
        shape = base.program.shape
        self.state = begun_state(shape if bucket is None else replace(shape, bucket=bucket), random)
        self.expected = run(base.program, base, self.state, RandomInterleaving(0))

    def fault(self, mutant: Program, runs: int) -> str | None:
        """What goes wrong under some interleaving, or None where all give the same bits as the true program."""
        if 0 < mutant.shape.bucket < self.base.program.shape.bucket:  # it does not claim to decode all positions
            return Trial(self.base, self.random, mutant.shape.bucket).run_all(mutant, runs)
        return self.run_all(mutant, runs)

    def run_all(self, mutant: Program, runs: int) -> str | None:
        """`fault`, from this trial's own state; in every order hints are waited for, and are passed."""
        for interleaving, early in product(orders(mutant.sms, self.random, runs), (False, True)):
            try:
                difference = run(mutant, self.base, self.state, interleaving, early).difference(self.expected)
            except (VmError, ValueError) as error:
                return str(error)
            if difference:
                return difference
        return None
