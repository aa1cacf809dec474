"""Consumers that pass hints and look for their values, as the GPU's do: the same bits, whatever the hints say and when."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from instructions.codec import MAX_SIGNALS, NONE, Word
from megakernel.vm import VmError
from megakernel.vm.interleaving import adversaries
from scheduler.program import Program
from tests.support.vm_models import find, mutated, outcome, program, vm_of

SMS = 5
TOKENS = 6


@functools.cache
def good() -> Program:
    return program(sms=SMS, policy="balanced")


@functools.cache
def expected() -> tuple[list[int], bytes]:
    """Of consumers that wait for every counter."""
    return outcome(vm_of(good()), TOKENS)


def without_hints() -> Program:
    """A program in which nobody sends a signal that is a hint to all who wait for it."""
    made = good()
    words = made.words.copy()
    waits, hints = words[:, Word.WAIT : Word.WAIT + 2], made.hints
    told = set(waits[hints].tolist()) - set(waits[~hints & (np.arange(2) < words[:, Word.WAITS, None])].tolist())
    signals = words[:, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS]
    signals[np.isin(signals, list(told))] = NONE
    assert (words != made.words).any(axis=1).sum() > len(words) // 2
    return dataclasses.replace(made, words=words)


@pytest.mark.parametrize("seed", range(12))
def test_every_seed(seed: int) -> None:
    assert good().hints.any()
    assert outcome(vm_of(good(), seed=seed, early=True), TOKENS) == expected()


@pytest.mark.parametrize("number", range(len(adversaries(SMS))))
def test_every_adversary(number: int) -> None:
    assert outcome(vm_of(good(), interleaving=adversaries(SMS)[number], early=True), TOKENS) == expected()


@pytest.mark.parametrize("seed", range(4))
def test_hints_that_never_come(seed: int) -> None:
    """Nothing is ordered by them, and nobody who looks for values misses them; who waits for them is stuck."""
    assert outcome(vm_of(without_hints(), seed=seed, early=True), TOKENS) == expected()
    with pytest.raises(VmError, match="no SM can go on"):
        vm_of(without_hints(), seed=seed).launch(TOKENS)


def test_what_does_not_announce_itself_must_be_waited_for() -> None:
    """Where no LM head releases, their counter is a hint: then nothing orders the logits and their reader."""
    made = good()
    for nth in range(SMS):
        made = mutated(made, find(made, "lm_head", nth=nth), RELEASE=0)
    assert made.hints.sum() == good().hints.sum() + 1
    for order in adversaries(SMS):
        with pytest.raises(VmError):
            vm_of(made, interleaving=order, early=True).launch(TOKENS)
