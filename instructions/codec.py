"""Instructions as fixed-size int32 words, and back, and as text.

One record is WORDS numbers: what to do (opcode, layer, payload), which pages to stream through the ring, which counters to
wait for, which to signal.  The same `Word` numbers are read by the CPU machine, the checker and the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from instructions.base import Instruction
from instructions.registry import BY_OPCODE

WORDS = 32
MAX_WAITS = 2
MAX_SIGNALS = 2
NONE = -1
INT32_MAX = 2**31 - 1
WHOLE = (int, np.integer)


class Word(IntEnum):
    """Place of each word in a record.  WAIT and TARGET take MAX_WAITS words each, SIGNAL takes MAX_SIGNALS."""

    OPCODE = 0
    LAYER = 1
    PAGE = 2  # number, within the token, of this SM's first page use of the instruction
    PAGES = 3  # page uses
    TAPE = 4  # first page of the tape (or of the KV cache) that is streamed
    LOAD_WAIT = 5  # counter the loader waits for before it streams, of the previous token; NONE: nothing to wait for
    LOAD_TARGET = 6
    WAITS = 7  # number of waits
    LAGS = 8  # bit j: wait j is for the previous token
    WAIT = 9
    TARGET = 11  # signals a token that make up wait j
    SIGNAL = 13  # counters to add one to when the instruction's rows are stored; NONE: none
    RELEASE = 15  # 1: whoever sees the signals sees all that this SM has stored; 0: they only say that it has been done
    PAYLOAD = 16


class CodecError(ValueError):
    """A record that is no instruction, or an instruction that does not fit a record."""


@dataclass(frozen=True)
class Wait:
    """Go on when `counter` has reached `target` times the tokens finished, this one included unless `lag` is 1."""

    counter: int
    target: int
    lag: int = 0

    def threshold(self, epoch: int) -> int:
        """Counter value needed by token number `epoch`, counted from 0."""
        return self.target * (epoch + 1 - self.lag)


@dataclass(frozen=True)
class Scheduled:
    """An instruction with all that the scheduler decided for it."""

    instruction: Instruction
    page: int = 0
    pages: int = 0
    tape: int = 0
    load_wait: Wait | None = None
    waits: tuple[Wait, ...] = ()
    signals: tuple[int, ...] = ()
    release: bool = False


def encode(item: Scheduled) -> np.ndarray:
    """One record, int32 [WORDS]; raises CodecError for what `decode` would not give back."""
    instruction, waits, signals = item.instruction, item.waits, item.signals
    if len(waits) > MAX_WAITS or len(signals) > MAX_SIGNALS:
        raise CodecError(f"{instruction}: {len(waits)} waits and {len(signals)} signals do not fit a record")
    if item.load_wait is not None and item.load_wait.lag != 1 or any(wait.lag not in (0, 1) for wait in waits):
        raise CodecError(f"{instruction}: a wait is for this token or the one before, a load wait for the one before")
    payload = [getattr(instruction, name) for name in instruction.payload_names()]
    targets = [number for wait in waits for number in (wait.counter, wait.target)]
    targets += [item.load_wait.counter, item.load_wait.target] if item.load_wait is not None else []
    for number in (instruction.layer, item.page, item.pages, item.tape, *payload, *targets, *signals):
        if not isinstance(number, WHOLE) or not 0 <= number <= INT32_MAX:
            raise CodecError(f"{instruction}: {number!r} is no number from 0 to {INT32_MAX}")
    words = [0] * WORDS
    words[Word.OPCODE], words[Word.LAYER] = instruction.OPCODE, instruction.layer
    words[Word.PAGE], words[Word.PAGES], words[Word.TAPE] = item.page, item.pages, item.tape
    words[Word.LOAD_WAIT] = NONE
    if item.load_wait is not None:
        words[Word.LOAD_WAIT], words[Word.LOAD_TARGET] = item.load_wait.counter, item.load_wait.target
    words[Word.WAITS] = len(waits)
    words[Word.WAIT : Word.WAIT + MAX_WAITS] = [wait.counter for wait in waits] + [NONE] * (MAX_WAITS - len(waits))
    words[Word.TARGET : Word.TARGET + len(waits)] = [wait.target for wait in waits]
    words[Word.LAGS] = sum(wait.lag << j for j, wait in enumerate(waits))
    words[Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS] = [*signals, *[NONE] * (MAX_SIGNALS - len(signals))]
    words[Word.RELEASE] = int(item.release)
    words[Word.PAYLOAD : Word.PAYLOAD + len(payload)] = payload
    return np.array(words, dtype=np.int32)


def decode(words: np.ndarray | Sequence[int]) -> Scheduled:
    """The inverse of `encode`; raises CodecError for an unknown opcode or words that encode nothing."""
    w = np.asarray(words).tolist()
    kind = BY_OPCODE.get(w[Word.OPCODE])
    if kind is None:
        raise CodecError(f"unknown opcode {w[Word.OPCODE]}")
    if not 0 <= w[Word.WAITS] <= MAX_WAITS:
        raise CodecError(f"{w[Word.WAITS]} waits in a record that holds at most {MAX_WAITS}")
    if w[Word.RELEASE] not in (0, 1):
        raise CodecError(f"its signals release {w[Word.RELEASE]}, it must be 0 or 1")
    payload = {name: w[Word.PAYLOAD + j] for j, name in enumerate(kind.payload_names())}
    waits = tuple(Wait(w[Word.WAIT + j], w[Word.TARGET + j], w[Word.LAGS] >> j & 1) for j in range(w[Word.WAITS]))
    load_wait = None if w[Word.LOAD_WAIT] == NONE else Wait(w[Word.LOAD_WAIT], w[Word.LOAD_TARGET], 1)
    signals = tuple(c for c in w[Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS] if c != NONE)
    instruction = kind(layer=w[Word.LAYER], **payload)
    pages = (w[Word.PAGE], w[Word.PAGES], w[Word.TAPE])
    return Scheduled(instruction, *pages, load_wait, waits, signals, bool(w[Word.RELEASE]))


def disassemble(item: Scheduled) -> str:
    """One line of readable text: mnemonic, layer, payload, pages, waits, signals."""
    instruction = item.instruction
    parts = [f"{instruction.MNEMONIC:<9} layer={instruction.layer}"]
    parts += [f"{name}={getattr(instruction, name)}" for name in instruction.payload_names()]
    if item.pages:
        parts.append(f"pages={item.page}+{item.pages} from={item.tape}")
    if item.load_wait is not None:
        parts.append(f"load-wait=c{item.load_wait.counter}>={item.load_wait.target}*previous")
    for wait in item.waits:
        parts.append(f"wait=c{wait.counter}>={wait.target}*{'previous' if wait.lag else 'epoch'}")
    parts += [f"{'release' if item.release else 'signal'}=c{counter}" for counter in item.signals]
    return " ".join(parts)
