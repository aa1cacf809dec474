"""Launches of programs of several columns: so many steps, from where each sequence stands in GPU memory.

A step decodes of every sequence as many tokens as its drafts were right, and one more.  Where the sequences stand then, the
host learns when a launch has landed; the next may be enqueued before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from instructions.base import SamplingState
from megakernel.control_block import CONTROL_WORDS, REQUEST, SEQUENCE_WORDS, SEQUENCES, Control, Progress, Source
from megakernel.device.kernel import megakernel
from megakernel.gpu.control import Outcome, control_words, progress_words, request_place
from megakernel.gpu.machine import LAUNCH_OPTIONS, GpuProgram, GpuState, check_fit


def place_sequence(state: GpuState, number: int, position: int, end: int, slices: int, source: Source = Source.LOOK_UP) -> None:
    """Enqueue that sequence `number` goes on at `position`, whose token is known, and not beyond `end`.

    `slices`: of its attention at those positions, were it alone.
    """
    first = SEQUENCES + number * SEQUENCE_WORDS
    words = torch.from_numpy(progress_words(position, end, slices, source))
    state.control[first : first + len(words)].copy_(words)


def join_sequence(
    state: GpuState, number: int, tokens: Sequence[int], sampling: SamplingState, stop_tokens: Collection[int], kept: int = 0
) -> None:
    """Enqueue a new request as sequence `number`; the first `kept` of its tokens are there already.  The others go on."""
    words = control_words(len(tokens), sampling, stop_tokens)[:REQUEST]
    first = number * state.stride
    state.tokens[first + kept : first + len(tokens)] = torch.from_numpy(np.array(tokens[kept:], dtype=np.int32))
    place, fault = request_place(number), int(Control.FAULT)
    words[fault] = 0
    state.control[place : place + REQUEST].copy_(torch.from_numpy(words))


@dataclass(frozen=True)
class Landed:
    """What a launch has made of one sequence: the tokens after those known, its position, and whether it has ended."""

    tokens: list[int]
    position: int
    stopped: bool
    numberless: bool
    last: int  # the column whose choice was its last


@dataclass(frozen=True, eq=False)
class ColumnFlight:
    """A launch under way of up to `steps` steps; what it leaves lands on the host once `landed` has passed."""

    program: ColumnProgram
    steps: int
    control: torch.Tensor  # int32 [words], pinned
    tokens: torch.Tensor  # int32 [sequences, positions], pinned: each sequence's, from `firsts` on
    firsts: tuple[int, ...]
    landed: torch.cuda.Event

    def land(self) -> tuple[int, list[Landed]]:
        """Wait for the launch; the steps that it made, and what became of each sequence.

        Raises KernelFault if some wait of the kernel expired.  A sequence whose logits are no numbers says so itself.
        """
        self.landed.synchronize()
        outcome = Outcome(self.control.numpy())
        program = self.program
        outcome.raise_stuck(program.program)
        total = int(outcome.progress()[Progress.STEPS])
        made, program.state.steps = total - program.state.steps, total
        program.epoch += made
        program.enqueued -= self.steps
        return made, [self.of_sequence(outcome, number) for number in range(program.program.shape.sequences)]

    def of_sequence(self, outcome: Outcome, number: int) -> Landed:
        """What became of one sequence."""
        progress, request = outcome.progress(number), outcome.request(number)
        position = int(progress[Progress.POSITION])
        numberless = bool(request[Control.NO_NUMBERS])
        count = position - self.firsts[number] - numberless
        tokens = [int(token) for token in self.tokens[number, 1 : 1 + count]]
        return Landed(tokens, position, int(request[Control.STOP]) <= position, numberless, int(progress[Progress.LAST]))


class ColumnProgram(GpuProgram):
    """A program of several columns in GPU memory."""

    def launch_steps(self, steps: int, firsts: Sequence[int]) -> ColumnFlight:
        """Enqueue up to `steps` steps; returns at once.  `firsts`: positions that the sequences have reached already, from
        which on their tokens are asked for.

        Where no sequence has anything left to decode, the kernel leaves at once.  Raises ValueError where the program does not
        fit the state.
        """
        check_fit(self.program, self.state)
        state, shape = self.state, self.program.shape
        grid = (self.program.sms,)
        self.used = True
        megakernel[grid](*self.arguments(max(firsts), steps), **LAUNCH_OPTIONS)
        self.enqueued += steps
        most = 1 + self.enqueued * shape.depth + shape.depth
        control = torch.empty(CONTROL_WORDS, dtype=torch.int32, device="cpu", pin_memory=True)
        tokens = torch.empty(shape.sequences, most, dtype=torch.int32, device="cpu", pin_memory=True)
        control.copy_(state.control, non_blocking=True)
        for number, first in enumerate(firsts):
            here = state.tokens[number * state.stride + first :][: min(most, state.stride - first)]
            tokens[number, : len(here)].copy_(here, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
        return ColumnFlight(self, steps, control, tokens, tuple(firsts), landed)


def spoilt(tokens: Sequence[int], right: float, vocabulary: int, seed: int = 0) -> list[int]:
    """Tokens of which a share is right, the others one beside, drawn from a seed."""
    wrong = np.random.default_rng(seed).random(len(tokens)) >= right
    return [(token + int(off)) % vocabulary for token, off in zip(tokens, wrong, strict=True)]


def give_drafts(state: GpuState, position: int, tokens: Sequence[int]) -> None:
    """Enqueue drafts for the first sequence, from `position` on; none stand elsewhere."""
    given = state.tokens[state.sequences * state.stride :][: state.stride]
    given.fill_(-1)
    given[position : position + len(tokens)] = torch.from_numpy(np.array(tokens, dtype=np.int32))
