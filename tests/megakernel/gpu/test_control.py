"""What host and kernel tell each other: the control block, and where a fault began, from what every SM was stuck in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pytest

from instructions.base import GREEDY, SamplingState
from instructions.codec import NONE, decode, disassemble, encode
from megakernel.control_block import CONTROL_WORDS, MOST_STOP_TOKENS, REPORT_WORDS, REPORTS, Control
from megakernel.gpu.control import NEVER, Outcome, Stuck, control_words
from megakernel.gpu.errors import GpuError, KernelFault
from scheduler.build import build_program, make_shape
from scheduler.check import check
from scheduler.program import Program
from tests.support.compile_cases import MODELS

POSITION = 77
EPOCH = 3


@functools.cache
def program() -> Program:
    return build_program(make_shape(MODELS["bundled"], sms=12, capacity=512, bucket=512, slices=4), 12)


def grid_stuck_by(silent: set[tuple[int, int]]) -> list[Stuck]:
    """What the consumers are stuck in, sooner or later, when some records (SM, index) never signal in token number EPOCH."""
    queues = program().decoded
    counters = EPOCH * program().targets
    at = [0] * len(queues)
    moved = True
    while moved:
        moved = False
        for sm, queue in enumerate(queues):
            while at[sm] < len(queue) and all(counters[w.counter] >= w.threshold(EPOCH) for w in queue[at[sm]].waits):
                if (sm, at[sm]) not in silent:
                    for counter in queue[at[sm]].signals:
                        counters[counter] += 1
                at[sm] += 1
                moved = True
    stuck = []
    for sm, queue in enumerate(queues):
        if at[sm] < len(queue):
            wait = next(w for w in queue[at[sm]].waits if counters[w.counter] < w.threshold(EPOCH))
            found = (at[sm], wait.counter, wait.threshold(EPOCH), int(counters[wait.counter]), POSITION)
        else:  # it waits for the token's sample, at the next position
            [sample] = [item for q in queues for item in q if item.instruction.MNEMONIC == "sample"]
            [counter] = sample.signals
            found = (-1, counter, int(program().targets[counter]) * (EPOCH + 1), int(counters[counter]), POSITION + 1)
        stuck.append(Stuck(sm, *found))
    return stuck


def message(stuck: Sequence[Stuck]) -> str:
    """The error for a grid whose SMs noted these."""
    words = control_words(1, GREEDY, ())
    words[Control.FAULT] = 1
    reports = words[REPORTS:].reshape(-1, REPORT_WORDS)
    for one in stuck:
        reports[one.sm, :6] = (1, one.record, one.counter, one.wanted, one.seen, one.position)
    with pytest.raises(KernelFault) as caught:
        Outcome(words).raise_stuck(program())
    return str(caught.value)


def test_every_dropped_signal_leads_to_one_who_waits_for_it() -> None:
    for sm, queue in enumerate(program().decoded):
        for index, item in enumerate(queue):
            text = message(grid_stuck_by({(sm, index)}))
            [counter] = [counter for counter in item.signals if f"; counter {counter}, which" in text]
            assert f"{item.instruction.MNEMONIC} (layer {item.instruction.layer})" in text
            if item.instruction.MNEMONIC == "sample":
                assert "between two tokens" in text, "only the next token waits for it"
            else:
                waiting = [other for q in program().decoded for other in q if counter in [w.counter for w in other.waits]]
                assert any(f": {disassemble(other)};" in text for other in waiting)


def test_a_missing_block_leads_to_the_first_who_waits_for_it() -> None:
    for missing, queue in enumerate(program().decoded):
        stuck = grid_stuck_by({(missing, index) for index in range(len(queue))})
        text = message([one for one in stuck if one.sm != missing])
        owed = {counter for item in queue for counter in item.signals}
        assert sum(f"; counter {counter}, which" in text for counter in owed) == 1


def seeking(stuck: Sequence[Stuck]) -> list[Stuck]:
    """The same, but those who wait for no more than a hint look for the values that it tells of."""
    found = []
    for one in stuck:
        if one.record >= 0:
            place = int(program().starts[one.sm]) + one.record
            [number] = [j for j, w in enumerate(program().decoded[one.sm][one.record].waits) if w.counter == one.counter]
            if program().hints[place, number]:
                one = Stuck(one.sm, one.record, NONE, 0, 0, one.position)
        found.append(one)
    return found


def test_a_missing_block_leads_to_the_first_who_looks_for_its_values() -> None:
    for missing, queue in enumerate(program().decoded):
        stuck = seeking(grid_stuck_by({(missing, index) for index in range(len(queue))}))
        assert any(one.counter == NONE for one in stuck)
        text = message([one for one in stuck if one.sm != missing])
        owed = {counter for item in queue for counter in item.signals}
        assert sum(f"; counter {counter}, which" in text for counter in owed) == 1


def test_the_message_of_a_value_that_never_came() -> None:
    [(sm, item)] = [(sm, q[0]) for sm, q in enumerate(program().decoded) if q[0].instruction.MNEMONIC == "embed"]
    text = message(seeking(grid_stuck_by({(sm, 0)})))
    assert text.startswith(f"the kernel was stuck at position {POSITION}: SM ")
    assert ": qkv       layer=0 " in text
    assert f"; counter {item.signals[0]}, which 1 embed (layer 0) signal, told of values, and one of them never came. " in text


def test_a_value_that_no_counter_told_of() -> None:
    """On one SM the queue alone may order a reader; a value that is missing all the same is no other error."""
    alone = build_program(make_shape(MODELS["bundled"], sms=1, capacity=512, bucket=512), 1)
    words = alone.words.copy()
    assert decode(words[1]).instruction.MNEMONIC == "qkv"
    words[1] = encode(dataclasses.replace(decode(words[1]), waits=()))
    alone = dataclasses.replace(alone, words=words)
    assert check(alone).valid
    control = control_words(1, GREEDY, ())
    control[Control.FAULT] = 1
    control[REPORTS:][:6] = (1, 1, NONE, 0, 0, POSITION)
    with pytest.raises(KernelFault, match=r"SM 0 at #1: qkv .*; one of the values that it reads never came\. "):
        Outcome(control).raise_stuck(alone)


def test_the_message_has_the_figures() -> None:
    [(sm, item)] = [(sm, q[0]) for sm, q in enumerate(program().decoded) if q[0].instruction.MNEMONIC == "embed"]
    text = message(grid_stuck_by({(sm, 0)}))
    assert text.startswith(f"the kernel was stuck at position {POSITION}: SM ")
    assert ": qkv       layer=0 " in text
    assert f"counter {item.signals[0]}, which 1 embed (layer 0) signal, should have reached 4 but stood at 3" in text


def test_without_a_fault_nothing_is_raised() -> None:
    Outcome(control_words(1, GREEDY, ())).raise_stuck(program())


def test_control_words() -> None:
    seed = 2**63 - 5
    words = control_words(7, SamplingState(0.25, 40, 0.5, seed), {9, 3, 4})
    assert words.dtype == np.int32
    assert words.shape == (CONTROL_WORDS,)
    assert words[Control.STOP] == NEVER
    assert words[Control.PROMPT_LENGTH] == 7
    assert words[Control.TOP_K] == 40
    low, high = (int(words[word]) & 0xFFFFFFFF for word in (Control.SEED_LOW, Control.SEED_HIGH))
    assert low | high << 32 == seed
    assert words[Control.INVERSE_TEMPERATURE].view(np.float32) == 4.0
    assert words[Control.TOP_P].view(np.float32) == 0.5
    assert words[Control.STOP_TOKENS :][:4].tolist() == [3, 3, 4, 9]
    assert control_words(1, GREEDY, ())[Control.INVERSE_TEMPERATURE] == 0


def test_too_many_stop_tokens_are_refused() -> None:
    words = control_words(1, GREEDY, range(MOST_STOP_TOKENS))
    assert not words[REPORTS:].any(), "the tokens end where the reports begin"
    with pytest.raises(GpuError, match=f"{MOST_STOP_TOKENS + 1} stop tokens; the GPU backend takes at most {MOST_STOP_TOKENS}"):
        control_words(1, GREEDY, range(MOST_STOP_TOKENS + 1))
