"""A GPU in the kernel's place: keeps to the kernel's protocol with the host, and computes next to nothing.

It reads and writes the buffers that the kernel does.  Its KV cache holds token ids, one a position, and its next token is a
hash of those: a row that should have been written anew tells.  Where the host's epoch and the counters disagree, it reports a
fault, as the kernel's waits would, and likewise where this token's activations are not vacant when it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch

from instructions.codec import MAX_SIGNALS, NONE, Word
from instructions.drafts import look_up
from instructions.hand_over import HandOver
from instructions.shape import VACANT
from megakernel.control_block import REPORTS, SEQUENCE_WORDS, SEQUENCES, Control, Progress
from megakernel.geometry import COUNTER_STRIDE, TOKEN_SLACK, Geometry
from megakernel.gpu import columns, machine
from megakernel.gpu.control import request_place
from megakernel.options import Sizes
from models.tape import PAGE_BYTES

ARGUMENTS = machine.megakernel.arg_names
STOP, FAULT, PROMPT_LENGTH, STOP_TOKENS = Control.STOP, Control.FAULT, Control.PROMPT_LENGTH, Control.STOP_TOKENS


def next_token(tokens: np.ndarray, vocabulary: int) -> int:
    """A token that depends on the whole sequence."""
    return crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes()) % vocabulary


def cached(cache: torch.Tensor) -> np.ndarray:
    """The token ids in the fake KV cache, int32, one a position."""
    return cache.view(-1).view(torch.int32).numpy()


class FakePrefill:
    """In prefill's place: fills the cache, and leaves in `hidden` what its rows hash to; remembers what it was asked."""

    chunk = 16

    def __init__(self, state: machine.GpuState, sizes: Sizes | None, sms: int) -> None:
        self.state, self.sms = state, sms
        self.asked: list[tuple[int, int]] = []

    def on(self, state: machine.GpuState) -> FakePrefill:
        """The same for another state."""
        return FakePrefill(state, None, self.sms)

    def launch(self, start: int, stop: int) -> None:
        assert stop - start <= self.chunk
        self.asked.append((start, stop))
        rows, tokens = cached(self.state.cache), self.state.tokens.numpy()
        rows[start:stop] = tokens[start:stop]
        self.state.hidden.fill_(hidden_of(rows[:stop]))


def hidden_of(rows: np.ndarray) -> int:
    """What stands for the residual stream at the last of the positions, exact in fp32."""
    return next_token(rows, 2**20)


class FakeKernel:
    """Called as the kernel is; runs at once."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def warmup(self, *arguments: Any, **options: Any) -> None:
        """Nothing to compile."""

    def __getitem__(self, grid: tuple[int]) -> FakeKernel:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        given = dict(zip(self.names, arguments, strict=True))
        control, tokens, words = (given[name].numpy() for name in ("control", "tokens_buffer", "words"))
        counters = given["counters"].numpy()[::COUNTER_STRIDE]
        signals = words[:-1, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS]  # the last row is a spare
        targets = np.bincount(signals[signals != NONE], minlength=len(counters)).astype(np.int32)
        rows, tail = cached(given["cache_rows"]), bool((words[:, Word.OPCODE] == HandOver.OPCODE).any())
        geometry = given["S"].geometry
        vocabulary, second = geometry.vocabulary, geometry.second
        activations = given["activations"].view(torch.int32).numpy()
        for step in range(given["tokens"]):
            position = given["position"] + step
            if geometry.columns > 1:
                position = int(control[SEQUENCES + Progress.POSITION])
                if not any(runs(control, number) for number in range(geometry.sequences)):
                    return
            elif control[STOP] <= position:
                return
            if control[FAULT]:
                return
            wrong = np.flatnonzero(counters != targets * (given["epoch"] + step))
            if len(wrong):
                control[FAULT] = 1
                control[REPORTS : REPORTS + 6] = (1, 0, wrong[0], targets[wrong[0]], counters[wrong[0]], position)
                return
            here = ((given["epoch"] + step) & 1) * second
            if activations[here] != VACANT:
                control[FAULT] = 1
                control[REPORTS : REPORTS + 6] = (1, 0, NONE, 0, 0, position)
                return
            activations[here], activations[second - here] = 0, VACANT
            counters += targets
            if geometry.depth > 1:
                self.step(control, tokens, rows, geometry)
                continue
            if geometry.sequences > 1:
                self.step_of_all(control, tokens, rows, geometry, given["head_pages"])
                continue
            if tail:
                assert rows[position] == tokens[position] and given["hidden_state"][0] == hidden_of(rows[: position + 1])
            rows[position] = tokens[position]
            if position + 1 >= control[PROMPT_LENGTH]:
                chosen = next_token(rows[: position + 1], vocabulary)
                tokens[position + 1] = chosen
                if chosen in control[STOP_TOKENS + 1 :][: control[STOP_TOKENS]]:
                    control[STOP] = position + 1

    def step(self, control: np.ndarray, tokens: np.ndarray, rows: np.ndarray, geometry: Geometry) -> None:
        """A step of several columns of one sequence: what is drafted is decoded, and kept as far as it is right."""
        progress = control[SEQUENCES : SEQUENCES + len(Progress)]
        first, used, end = (int(progress[word]) for word in (Progress.POSITION, Progress.USED, Progress.END))
        progress[Progress.STEPS] += 1
        rows[first : first + used] = tokens[first : first + used]
        for place in range(used):
            following = first + place + 1
            chosen = next_token(rows[:following], geometry.vocabulary)
            drafted = place + 1 < used and tokens[following] == chosen
            tokens[following] = chosen
            progress[Progress.POSITION], progress[Progress.LAST] = following, place
            if chosen in control[STOP_TOKENS + 1 :][: control[STOP_TOKENS]]:
                control[STOP] = following
                return
            if not drafted:
                break
        most = min(geometry.depth, end - following) - 1
        drafts = look_up(tokens[: following + 1].tolist(), most) if most > 0 else []
        tokens[following + 1 : following + 1 + len(drafts)] = drafts
        progress[Progress.USED] = 1 + len(drafts)

    def step_of_all(
        self, control: np.ndarray, tokens: np.ndarray, rows: np.ndarray, geometry: Geometry, head_pages: int
    ) -> None:
        """A step of several sequences: those that take no part leave their cache as it is, those that have ended repeat their
        last position."""
        stride = head_pages * geometry.page_positions + TOKEN_SLACK
        apart = head_pages * geometry.layers * geometry.kv_heads * 2 * PAGE_BYTES // 4
        control[SEQUENCES + Progress.STEPS] += 1
        for number in range(geometry.sequences):
            progress, own = control[SEQUENCES + number * SEQUENCE_WORDS :], control[request_place(number) :]
            if not progress[Progress.END]:
                continue
            position = int(min(progress[Progress.POSITION], progress[Progress.END] - 1))
            known, cached = tokens[number * stride :], rows[number * apart :]
            cached[position] = known[position]
            if not runs(control, number):
                continue
            progress[Progress.POSITION] = position + 1
            if position + 1 >= own[PROMPT_LENGTH]:
                known[position + 1] = next_token(cached[: position + 1], geometry.vocabulary)
                if known[position + 1] in own[STOP_TOKENS + 1 :][: own[STOP_TOKENS]]:
                    own[STOP] = position + 1


def runs(control: np.ndarray, number: int) -> bool:
    """Whether a sequence has a position left to decode."""
    progress = control[SEQUENCES + number * SEQUENCE_WORDS :]
    return bool(progress[Progress.POSITION] < min(progress[Progress.END], control[request_place(number) + STOP]))


class PastEvent:
    """An event that has happened when it is recorded."""

    def record(self) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class FakeStream:
    """A stream on which nothing is ever under way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Nothing to wait for."""


@contextmanager
def fake_device(kernel: Any = None) -> Iterator[torch.device]:
    """Within it, `megakernel.gpu` runs on the device it yields, the CPU, and launches `kernel`, or else a fake one."""
    empty = torch.empty

    def unpinned(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*sizes, **options)

    with pytest.MonkeyPatch.context() as patch:
        kernel = kernel or FakeKernel(ARGUMENTS)
        for module in (machine, columns):
            patch.setattr(module, "megakernel", kernel)
        patch.setattr(torch, "empty", unpinned)
        patch.setattr(torch.cuda, "Event", PastEvent)
        for name in ("synchronize", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        for name in ("device", "stream"):
            patch.setattr(torch.cuda, name, nullcontext)
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, FakeStream)
        yield torch.device("cpu")
