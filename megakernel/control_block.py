"""The control block's layout: int32 words through which host and kernel tell each other what to do and what went wrong.

Plain integers, for the host (`megakernel.gpu.control`) and the kernel (`megakernel.device.context`) alike.
"""

from __future__ import annotations

from enum import IntEnum

from scheduler.limits import MAX_SMS


class Control(IntEnum):
    """The words of a request; the kernel writes STOP, FAULT and NO_NUMBERS, which the host reads after a launch."""

    STOP = 0  # first position that is not to be decoded: set when a stop token was chosen
    FAULT = 1  # 1 once some wait has expired
    PROMPT_LENGTH = 2
    TOP_K = 3
    SEED_LOW = 4
    SEED_HIGH = 5
    INVERSE_TEMPERATURE = 6  # fp32 bits; 0: greedy
    TOP_P = 7  # fp32 bits
    NO_NUMBERS = 8  # 1 once some logit was no number, or not finite: then STOP is set, too
    STOP_TOKENS = 9  # how many, then the tokens


class Progress(IntEnum):
    """Where a sequence stands, in programs of several columns: the kernel advances it with every step."""

    POSITION = 0  # of the step's first token
    USED = 1  # columns that hold tokens of its own: that one, and what may follow it
    END = 2  # first position that is not to be decoded by this launch; the kernel only reads it, and the next
    SOURCE = 3  # of drafts: see `Source`
    SLICES = 4  # of its attention, in programs of several sequences: as many as where it is alone
    STEPS = 5  # that were made, counted in the first sequence alone
    LAST = 6  # the column whose choice was the last that was stored


class Source(IntEnum):
    """Where drafts come from."""

    LOOK_UP = 0  # the sequence's own tokens
    GIVEN = 1  # a row beside its tokens, by position, -1 where there is none


MOST_SEQUENCES = 8
REPORTS = 64  # from here on, what each consumer, then each loader was stuck in
MOST_STOP_TOKENS = REPORTS - Control.STOP_TOKENS - 1
REPORT_WORDS = 8  # 1, record, counter, wanted, seen, position; counter -1: a value
LOADERS = MAX_SMS  # place of the first loader among the reports
SEQUENCES = REPORTS + 2 * REPORT_WORDS * MAX_SMS  # from here on, a record for each sequence:
REQUEST = 64  # `Progress`, and behind so many words those of its request, which for the first sequence are `Control`'s
SEQUENCE_WORDS = 128
CONTROL_WORDS = SEQUENCES + SEQUENCE_WORDS * MOST_SEQUENCES
