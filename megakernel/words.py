"""A program's words as the GPU gets them: those of `instructions.codec`, with all that is to be known of waits in one."""

from __future__ import annotations

import numpy as np

from instructions.codec import MAX_WAITS, WORDS, Word
from scheduler.program import Program

# Bits of the word WAITS, for wait 0; for wait j they are j further on.
WAIT_BIT = 0  # the record has such a wait
LAG_BIT = 8  # it is for the previous token
HINT_BIT = 16  # it is a hint, see `Program.hints`


def device_words(program: Program) -> np.ndarray:
    """The records, int32 [instructions + 1, WORDS]: SMs without a record fetch one, too, which is all zeros."""
    words = np.zeros((len(program.words) + 1, WORDS), dtype=np.int32)
    words[:-1] = program.words
    waits = (1 << program.words[:, Word.WAITS]) - 1 << WAIT_BIT
    lags = program.words[:, Word.LAGS] << LAG_BIT
    hints = program.hints @ (1 << (HINT_BIT + np.arange(MAX_WAITS, dtype=np.int32)))
    words[:-1, Word.WAITS] = waits | lags | hints
    return words
