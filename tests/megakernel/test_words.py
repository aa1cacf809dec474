"""A program's words as the GPU gets them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from instructions.codec import Word
from megakernel.words import HINT_BIT, LAG_BIT, WAIT_BIT, device_words
from scheduler.build import build_program, make_shape
from scheduler.program import Program
from tests.support.compile_cases import MODELS


@functools.cache
def program(tail: bool = False) -> Program:
    return build_program(make_shape(MODELS["bundled"], sms=12, capacity=512, bucket=512, slices=4, tail=tail), 12)


def bits(word: int, first: int) -> list[int]:
    return [word >> first + j & 1 for j in range(8)]


@pytest.mark.parametrize("tail", [False, True])
def test_the_waits_of_every_record(tail: bool) -> None:
    words = device_words(program(tail))
    items = [item for queue in program(tail).decoded for item in queue]
    releases = {counter for item in items if item.release for counter in item.signals}
    kinds = set()
    for word, item in zip(words[:-1, Word.WAITS].tolist(), items, strict=True):
        hints = [wait.lag == 0 and wait.counter not in releases for wait in item.waits]
        rest = [0] * (8 - len(item.waits))
        assert bits(word, WAIT_BIT) == [1] * len(item.waits) + rest
        assert bits(word, LAG_BIT) == [wait.lag for wait in item.waits] + rest
        assert bits(word, HINT_BIT) == [int(hint) for hint in hints] + rest
        kinds |= {(item.instruction.MNEMONIC, hint) for hint in hints}
    strict = {name for name, hint in kinds if not hint}
    assert strict == {"hand_over" if tail else "embed", "sample"}, (
        "all that read what does not announce itself, or wait for the token before"
    )
    assert {name for name, hint in kinds if hint} == {item.instruction.MNEMONIC for item in items} - strict


def test_the_kernel_reads_the_words_in_the_order_of_their_indices() -> None:
    """Also of a program whose columns lie one after another, and which has kept them so."""
    columns = dataclasses.replace(program())
    object.__setattr__(columns, "words", np.asfortranarray(program().words))
    assert device_words(columns).tobytes("A") == device_words(program()).tobytes()


def test_all_else_is_as_it_was() -> None:
    words = device_words(program())
    others = [word for word in range(words.shape[1]) if word != Word.WAITS]
    assert words.dtype == np.int32
    assert (words[:-1, others] == program().words[:, others]).all()
    assert not words[-1].any(), "an SM without a record fetches this one"
    assert program().words is not words and (program().words[:, Word.WAITS] <= 2).all()
