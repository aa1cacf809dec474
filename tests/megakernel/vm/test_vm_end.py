"""Tokens are opened by the counter of the last one's end, as on the GPU: what `Sample` signals, and nothing else tells it."""

from __future__ import annotations

import dataclasses
import functools
from random import Random

import numpy as np
import pytest

from instructions.codec import MAX_SIGNALS, MAX_WAITS, NONE, Word
from megakernel.vm import VmError
from megakernel.vm.interleaving import adversaries
from scheduler.check import check
from scheduler.program import Program
from tests.mutations.kinds import plant
from tests.support.vm_models import find, mutated, outcome, program, vm_of

SMS = 3
TOKENS = 4


@functools.cache
def good() -> Program:
    return program(sms=SMS)


@functools.cache
def expected() -> tuple[list[int], bytes]:
    return outcome(vm_of(good()), TOKENS)


def ended_early() -> Program:
    """The first down projection tells of the token's end as well, and whoever waits for it counts on both."""
    made, end = good(), good().end_counter
    place = find(made, "down")
    assert made.words[place, Word.SIGNAL + 1] == NONE
    words, targets = made.words.copy(), made.targets.copy()
    words[place, Word.SIGNAL + 1] = end
    targets[end] = 2
    for j in range(MAX_WAITS):
        words[words[:, Word.WAIT + j] == end, Word.TARGET + j] = 2
    words[words[:, Word.LOAD_WAIT] == end, Word.LOAD_TARGET] = 2
    return dataclasses.replace(made, words=words, targets=targets)


def test_the_end_is_what_sample_signals() -> None:
    sample = good().words[find(good(), "sample")]
    assert sample[Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS].tolist() == [good().end_counter, NONE]
    silent = mutated(good(), find(good(), "sample"), SIGNAL=NONE)
    assert silent.end_counter == NONE


@pytest.mark.parametrize("number", range(len(adversaries(SMS))))
def test_a_token_begins_as_soon_as_the_counter_says(number: int) -> None:
    """All waits of this program are met in their order: only SMs that open tokens by the counter itself go wrong."""
    with pytest.raises(VmError):
        vm_of(ended_early(), interleaving=adversaries(SMS)[number]).launch(TOKENS)
    assert not check(ended_early()).valid


@pytest.mark.parametrize("lag", [0, 1])
def test_waits_for_the_end_are_passed(lag: int) -> None:
    """An SM has waited for it when it opened the token; the kernel does not look at the lag."""
    place = find(good(), "gate_up", layer=1)
    assert good().words[place, Word.WAITS] == 1
    made = mutated(good(), place, WAITS=2, LAGS=2 * lag, WAIT__1=good().end_counter, TARGET__1=1)
    assert outcome(vm_of(made), TOKENS) == expected()
    assert check(made).valid == (lag == 1)


def test_what_embed_waits_for_opens_no_token() -> None:
    made = mutated(good(), find(good(), "embed"), WAITS=0, LAGS=0, WAIT=NONE, TARGET=0)
    assert outcome(vm_of(made), TOKENS) == expected()
    assert [finding.kind for finding in check(made).findings] == ["counter"], "and yet it must say what it needs"


def test_the_number_of_the_counter_does_not_matter() -> None:
    renamed = plant("renamed_end", good(), Random(1))
    assert renamed is not None and renamed.end_counter != good().end_counter
    assert outcome(vm_of(renamed), TOKENS) == expected()


def test_the_epoch_is_what_the_counter_says() -> None:
    vm = vm_of(good())
    for tokens in (3, 1, 2):
        vm.launch(tokens)
        assert vm.epoch == vm.counters[good().end_counter].value
    assert vm.epoch == 6
    silent = mutated(good(), find(good(), "sample"), SIGNAL=NONE)
    with pytest.raises(VmError, match="the counter of the token's end stands at 0 after 1 tokens"):
        vm_of(silent).launch(1)


def test_a_token_that_nothing_opens_is_told_so() -> None:
    """Sample is there, but its signal goes nowhere; the loaders that wait for the cache's rows do not."""
    made = mutated(good(), find(good(), "sample"), SIGNAL=NONE)
    words = made.words.copy()
    words[:, Word.LOAD_WAIT], words[:, Word.LOAD_TARGET] = NONE, 0
    with pytest.raises(VmError, match=r"consumer, token 1, waits for tokens finished >= 1, seen 0, to open the token"):
        vm_of(dataclasses.replace(made, words=words)).launch(2)
    assert np.array_equal(made.targets, good().targets)
