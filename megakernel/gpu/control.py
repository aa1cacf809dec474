"""The control block: int32 words through which host and kernel tell each other what to do and what went wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np

from instructions.base import SamplingState
from instructions.codec import NONE, Scheduled, disassemble
from megakernel.control_block import (
    CONTROL_WORDS,
    LOADERS,
    MOST_STOP_TOKENS,
    REPORT_WORDS,
    REPORTS,
    REQUEST,
    SEQUENCE_WORDS,
    SEQUENCES,
    Control,
    Progress,
    Source,
)
from megakernel.errors import NotNumbers
from megakernel.gpu.errors import GpuError, KernelFault
from scheduler.program import Program

NEVER = np.iinfo(np.int32).max


def control_words(prompt_length: int, sampling: SamplingState, stop_tokens: Collection[int]) -> np.ndarray:
    """A fresh control block for a request, int32 [CONTROL_WORDS]; raises GpuError for too many stop tokens."""
    if len(stop_tokens) > MOST_STOP_TOKENS:
        raise GpuError(f"{len(stop_tokens)} stop tokens; the GPU backend takes at most {MOST_STOP_TOKENS}")
    words = np.zeros(CONTROL_WORDS, dtype=np.int32)
    inverse = np.float32(1.0) / np.float32(sampling.temperature) if sampling.temperature else np.float32(0.0)
    words[Control.STOP] = NEVER
    words[Control.PROMPT_LENGTH] = prompt_length
    words[Control.TOP_K] = min(sampling.top_k, NEVER)
    words[Control.SEED_LOW : Control.SEED_HIGH + 1] = np.array([sampling.seed], np.int64).view(np.int32)
    words[Control.INVERSE_TEMPERATURE] = inverse.view(np.int32)
    words[Control.TOP_P] = np.float32(sampling.top_p).view(np.int32)
    first = Control.STOP_TOKENS
    words[first] = len(stop_tokens)
    words[first + 1 : first + 1 + len(stop_tokens)] = sorted(stop_tokens)
    return words


def request_place(sequence: int) -> int:
    """Where the words of a sequence's request begin."""
    return SEQUENCES + sequence * SEQUENCE_WORDS + REQUEST if sequence else 0


def progress_words(position: int, end: int, slices: int, source: Source = Source.LOOK_UP) -> np.ndarray:
    """What a sequence is told where it stands, with no drafts, int32 [5]: the first words of `Progress`."""
    return np.array([position, 1, end, source, slices], dtype=np.int32)


@dataclass(frozen=True)
class Stuck:
    """What the consumer or the loader of one SM was stuck in: `record` is its queue index, -1 between two tokens."""

    sm: int
    record: int
    counter: int
    wanted: int
    seen: int
    position: int
    loader: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a control block says after a launch."""

    words: np.ndarray

    @property
    def stop_position(self) -> int:
        """First position that is not to be decoded, or NEVER."""
        return int(self.words[Control.STOP])

    def progress(self, sequence: int = 0) -> np.ndarray:
        """Where a sequence stands after a launch of several columns, int32 words as `Progress` names them."""
        first = SEQUENCES + sequence * SEQUENCE_WORDS
        return self.words[first : first + len(Progress)]

    def request(self, sequence: int = 0) -> np.ndarray:
        """The words of a sequence's request, as `Control` names them."""
        first = request_place(sequence)
        return self.words[first : first + REQUEST]

    @property
    def faulty(self) -> bool:
        """Whether some wait expired."""
        return bool(self.words[Control.FAULT])

    @property
    def numberless(self) -> bool:
        """Whether the last token's logits were no numbers."""
        return bool(self.words[Control.NO_NUMBERS])

    @property
    def stuck(self) -> list[Stuck]:
        """What every consumer and loader was stuck in that was."""
        reports = self.words[REPORTS:SEQUENCES].reshape(-1, REPORT_WORDS)
        found = []
        for place in np.flatnonzero(reports[:, 0]):
            loader, sm = divmod(int(place), LOADERS)
            record, counter, wanted, seen, position = (int(word) for word in reports[place, 1:6])
            found.append(Stuck(sm, record, counter, wanted, seen, position, bool(loader)))
        return found

    def raise_numberless(self) -> None:
        """Raise NotNumbers if the last token's logits were no numbers."""
        if self.numberless:
            raise NotNumbers(self.stop_position - 1)

    def raise_stuck(self, program: Program) -> None:
        """Raise KernelFault if some wait expired, with the instruction at which it began.

        Whatever depends on a signal that never comes is stuck as well; the first in the order of the dependencies is the one
        that waits for it.
        """
        if not self.faulty:
            return
        mend = "This is a fault of the schedule or of the machine, not of the request; try again"
        depth = wait_depths(program)
        first = min(self.stuck, key=lambda stuck: place_in_time(stuck, program, depth))
        if first.record < 0:
            place = "between two tokens"
        else:
            place = f"at #{first.record}: {disassemble(program.decoded[first.sm][first.record])}"
        role = "the loader of SM" if first.loader else "SM"
        counter = counter_of(first, program, depth)
        because = f"counter {counter}, which {signallers(program, counter)} signal, "
        if counter == NONE:
            because = "one of the values that it reads never came"
        elif first.counter == NONE:
            because += "told of values, and one of them never came"
        else:
            because += f"should have reached {first.wanted} but stood at {first.seen}"
        raise KernelFault(f"the kernel was stuck at position {first.position}: {role} {first.sm} {place}; {because}. {mend}")


def wait_depths(program: Program) -> dict[int, int]:
    """How many counters, one after another, must be met before each counter can be, within a token."""
    producers: dict[int, list[Scheduled]] = defaultdict(list)
    for item in (item for queue in program.decoded for item in queue):
        for counter in item.signals:
            producers[counter].append(item)

    @cache
    def depth(counter: int) -> int:
        before = {wait.counter for item in producers[counter] for wait in item.waits if not wait.lag}
        return 1 + max(map(depth, before), default=0)

    return {counter: depth(counter) for counter in range(program.counters)}


def counter_of(stuck: Stuck, program: Program, depth: dict[int, int]) -> int:
    """The counter that an SM was stuck waiting for; where it looked for a value, the last one that told of its values,
    or NONE."""
    waits = program.decoded[stuck.sm][stuck.record].waits if stuck.counter == NONE else ()
    return max((wait.counter for wait in waits), key=lambda counter: depth[counter], default=stuck.counter)


def place_in_time(stuck: Stuck, program: Program, depth: dict[int, int]) -> tuple[int, int]:
    """Which token, and how deep in it, the signals belong to that an SM was stuck waiting for."""
    counter = counter_of(stuck, program, depth)
    lagging = (
        (stuck.loader and stuck.counter != NONE)  # one that looks for a choice wants this token's
        or stuck.record < 0
        or any(wait.lag and wait.counter == counter for wait in program.decoded[stuck.sm][stuck.record].waits)
    )
    return stuck.position - lagging, depth.get(counter, 0)


def signallers(program: Program, counter: int) -> str:
    """The instructions that signal a counter, as "8 attention (layer 3)"."""
    found = Counter(
        (item.instruction.MNEMONIC, item.instruction.layer)
        for queue in program.decoded
        for item in queue
        if counter in item.signals
    )
    return " and ".join(f"{count} {name} (layer {layer})" for (name, layer), count in sorted(found.items())) or "nobody"
