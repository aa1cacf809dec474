"""Planted faults: a signal that is never sent, a thread block that is never there.

The kernel gives up within two seconds, the message names an instruction that waits for what is missing, and the GPU, the
engine and the next request are none the worse.  A signal that is a hint may be lost: the values come all the same.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from instructions.codec import MAX_SIGNALS, MAX_WAITS, NONE, Scheduled, Word, disassemble
from megakernel.device import down, matvec
from megakernel.engine import Engine
from megakernel.gpu import machine
from megakernel.gpu.errors import KernelFault
from megakernel.words import device_words
from scheduler.program import Program
from tests.support.gpu_models import random_tokens

pytestmark = pytest.mark.gpu
PROMPT = random_tokens("bundled", 6, seed=1)
TOKENS = 40
SECONDS = 2.0
LAST_LAYER = 4
NORM_EARLY, DOWN_EARLY = matvec.EARLY.value, down.EARLY.value


def generate(decoder: Engine) -> list[int]:
    return list(decoder.generate(PROMPT, TOKENS, reuse=False))


@pytest.fixture(scope="module")
def expected(decoder: Engine) -> list[int]:
    return generate(decoder)


@contextmanager
def running(decoder: Engine, changed: Program) -> Iterator[None]:
    """The engine decodes the first context bucket with other records, though the host knows it by the true ones."""
    backend: Any = decoder._backend
    good, bad = backend.program(0), Future[Any]()
    program = machine.GpuProgram(dataclasses.replace(changed, words=good.result().program.words), backend.state)
    program.program, program.words = changed, torch.from_numpy(device_words(changed)).to(backend.state.device)
    torch.cuda.synchronize()
    bad.set_result(program)
    backend.building.made[0, False] = bad
    try:
        yield
    finally:
        backend.building.made[0, False] = good


def program_of(decoder: Engine) -> Program:
    """The program of the first context bucket."""
    backend: Any = decoder._backend
    program: Program = backend.program(0).result().program
    return program


def place_of(program: Program, mnemonic: str, layer: int) -> tuple[int, Scheduled]:
    """The last record of a kind in a layer, as its place among all records."""
    items = [item for queue in program.decoded for item in queue]
    kinds = [(item.instruction.MNEMONIC, item.instruction.layer) for item in items]
    place = max(i for i, kind in enumerate(kinds) if kind == (mnemonic, layer))
    return place, items[place]


def told(program: Program, item: Scheduled) -> bool:
    """Whether the signals of an instruction are hints to those who wait for them."""
    counters = program.words[:, Word.WAIT : Word.WAIT + MAX_WAITS]
    waits = np.arange(MAX_WAITS) < program.words[:, Word.WAITS, None]
    return bool(program.hints[waits & np.isin(counters, item.signals)].all())


def silenced(program: Program, place: int) -> Program:
    """A copy of a program in which one record sends no signal."""
    words = program.words.copy()
    words[place, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS] = NONE
    return dataclasses.replace(program, words=words)


def check_report(message: str, program: Program, counters: set[int]) -> None:
    """The message names one of these counters, and an instruction that waits for it (or nobody's, between two tokens)."""
    named = [counter for counter in counters if f"counter {counter}," in message]
    assert len(named) == 1, message
    items = [item for queue in program.decoded for item in queue]
    waiting = {
        disassemble(item)
        for item in items
        for wait in (*item.waits, *([] if item.load_wait is None else [item.load_wait]))
        if wait.counter == named[0]
    }
    assert any(text in message for text in waiting) or "between two tokens" in message, message


def position_of(message: str) -> int:
    """The position that the kernel was stuck at."""
    found = re.search(r"stuck at position (\d+):", message)
    assert found, message
    return int(found[1])


def fault_of(run: Callable[[], object]) -> str:
    """The message of the KernelFault that a call raises in time."""
    begun = time.perf_counter()
    with pytest.raises(KernelFault) as caught:
        run()
    assert time.perf_counter() - begun < SECONDS
    return str(caught.value)


@pytest.mark.parametrize(
    ("mnemonic", "layer", "spare"),
    [("embed", 0, 1), ("o_proj", 1, NORM_EARLY), ("gate_up", LAST_LAYER, DOWN_EARLY), ("down", 2, NORM_EARLY),
     ("lm_head", 0, 0), ("sample", 0, 0)],
)  # fmt: skip
def test_a_dropped_signal(decoder: Engine, expected: list[int], mnemonic: str, layer: int, spare: int) -> None:
    """One a token; a reader that begins to look `spare` signals early misses them a few tokens later."""
    program = program_of(decoder)
    place, item = place_of(program, mnemonic, layer)
    assert item.signals, "there is a signal to drop"
    assert spare <= min(program.targets[counter] for counter in item.signals)
    assert told(program, item) == (spare > 0)
    with running(decoder, silenced(program, place)):
        message = fault_of(lambda: generate(decoder))
    check_report(message, program, set(item.signals))
    assert position_of(message) in (spare, spare + 1), "the loader may be a token ahead"
    assert generate(decoder) == expected


@pytest.mark.parametrize(("mnemonic", "layer"), [("qkv", 0), ("attention", 2)])
def test_a_lost_hint(decoder: Engine, expected: list[int], mnemonic: str, layer: int) -> None:
    """Whoever reads so little that it looks for it at once does not miss the signal."""
    program = program_of(decoder)
    place, item = place_of(program, mnemonic, layer)
    assert item.signals and told(program, item), "there is a signal to drop"
    with running(decoder, silenced(program, place)):
        assert generate(decoder) == expected
    assert generate(decoder) == expected


def test_a_fault_while_tokens_are_read(decoder: Engine, expected: list[int]) -> None:
    """What was decoded before it is right, and the position of the fault is that of the first launch that hangs."""
    program = program_of(decoder)
    place, item = place_of(program, "lm_head", 0)
    generation = decoder.generate(PROMPT, TOKENS, reuse=False)
    read = [next(generation) for _ in range(3)]
    backend: Any = decoder._backend
    decoded = backend.position
    with running(decoder, silenced(program, place)):
        message = fault_of(lambda: read.extend(generation))
    check_report(message, program, set(item.signals))
    assert position_of(message) in (decoded, decoded + 1)
    assert read == expected[: len(read)]
    assert generate(decoder) == expected


class OneBlockShort:
    """The kernel, launched with a block fewer than the program has SMs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.kernel[(grid[0] - 1,)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def test_a_missing_block(decoder: Engine, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(decoder)
    owed = {counter for item in program.decoded[-1] for counter in item.signals}
    assert owed
    with monkeypatch.context() as patched:
        patched.setattr(machine, "megakernel", OneBlockShort(machine.megakernel))
        message = fault_of(lambda: generate(decoder))
    check_report(message, program, owed)
    assert generate(decoder) == expected
