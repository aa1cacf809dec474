"""The control block: 64 int32 words through which host and kernel tell each other what to do and what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from instructions.base import SamplingState
from instructions.codec import disassemble
from megakernel.device import context
from megakernel.gpu.errors import GpuError, KernelFault
from scheduler.program import Program

NEVER = np.iinfo(np.int32).max
WORDS = context.CONTROL_WORDS.value
MOST_STOP_TOKENS = WORDS - context.STOP_TOKENS.value - 1


def control_words(prompt_length: int, sampling: SamplingState, stop_tokens: Collection[int]) -> np.ndarray:
    """A fresh control block for a request, int32 [64]; raises GpuError for too many stop tokens."""
    if len(stop_tokens) > MOST_STOP_TOKENS:
        raise GpuError(f"{len(stop_tokens)} stop tokens; the GPU backend takes at most {MOST_STOP_TOKENS}")
    words = np.zeros(WORDS, dtype=np.int32)
    inverse = np.float32(1.0) / np.float32(sampling.temperature) if sampling.temperature else np.float32(0.0)
    words[context.STOP.value] = NEVER
    words[context.PROMPT_LENGTH.value] = prompt_length
    words[context.TOP_K.value] = min(sampling.top_k, NEVER)
    words[context.SEED_LOW.value : context.SEED_HIGH.value + 1] = np.array([sampling.seed], np.int64).view(np.int32)
    words[context.INVERSE_TEMPERATURE.value] = inverse.view(np.int32)
    words[context.TOP_P.value] = np.float32(sampling.top_p).view(np.int32)
    first = context.STOP_TOKENS.value
    words[first] = len(stop_tokens)
    words[first + 1 : first + 1 + len(stop_tokens)] = sorted(stop_tokens)
    return words


@dataclass(frozen=True)
class Outcome:
    """What a control block says after a launch."""

    words: np.ndarray

    @property
    def stop_position(self) -> int:
        """First position that is not to be decoded, or NEVER."""
        return int(self.words[context.STOP.value])

    def raise_fault(self, program: Program) -> None:
        """Raise KernelFault if some wait expired, with the instruction that was stuck."""
        if self.words[context.FAULT.value] == 0:
            return
        first = context.FAULT_SM.value
        sm, index, counter, wanted, seen, position = (int(word) for word in self.words[first : first + 6])
        if index < 0:
            place = "between two tokens"
        else:
            place = f"at #{index}: {disassemble(program.decoded[sm][index])}"
        raise KernelFault(
            f"the kernel was stuck at position {position}: SM {sm} {place}; counter {counter}, which "
            f"{signallers(program, counter)} signal, should have reached {wanted} but stood at {seen}. "
            "This is a fault of the schedule or of the machine, not of the request; try again"
        )


def signallers(program: Program, counter: int) -> str:
    """The instructions that signal a counter, as "8 attention (layer 3)"."""
    found = Counter(
        (item.instruction.MNEMONIC, item.instruction.layer)
        for queue in program.decoded
        for item in queue
        if counter in item.signals
    )
    return " and ".join(f"{count} {name} (layer {layer})" for (name, layer), count in sorted(found.items())) or "nobody"
