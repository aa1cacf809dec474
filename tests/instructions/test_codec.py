"""The codec is exact for every instruction, refuses what does not fit, and its text says what the words say."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructions.base import Instruction
from instructions.codec import (
    MAX_SIGNALS,
    MAX_WAITS,
    NONE,
    WORDS,
    CodecError,
    Scheduled,
    Wait,
    Word,
    decode,
    disassemble,
    encode,
)
from instructions.embed import Embed
from instructions.lm_head import LmHead
from instructions.registry import BY_OPCODE, INSTRUCTIONS

INT32_MAX = 2**31 - 1
NUMBERS = st.integers(0, INT32_MAX)
NOT_NUMBERS = st.integers(max_value=-1) | st.integers(min_value=INT32_MAX + 1) | st.floats() | st.none() | st.text(max_size=3)
ANY_KIND = pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.MNEMONIC)


def waits(lags: st.SearchStrategy[int]) -> st.SearchStrategy[Wait]:
    return st.builds(Wait, NUMBERS, NUMBERS, lags)


@st.composite
def scheduled(draw: st.DrawFn, kind: type[Instruction]) -> Scheduled:
    return Scheduled(
        kind(**{field.name: draw(NUMBERS) for field in fields(kind)}),
        draw(NUMBERS),
        draw(NUMBERS),
        draw(NUMBERS),
        draw(st.none() | waits(st.just(1))),
        tuple(draw(st.lists(waits(st.integers(0, 1)), max_size=MAX_WAITS))),
        tuple(draw(st.lists(NUMBERS, max_size=MAX_SIGNALS))),
        draw(st.booleans()),
    )


@ANY_KIND
@given(data=st.data())
def test_decode_is_the_inverse_of_encode(kind: type[Instruction], data: st.DataObject) -> None:
    item = data.draw(scheduled(kind))
    words = encode(item)
    assert words.dtype == np.int32 and words.shape == (WORDS,)
    assert decode(words) == item
    assert np.array_equal(encode(decode(words)), words)
    assert decode(words.tolist()) == item


@ANY_KIND
@given(data=st.data())
def test_different_items_have_different_words(kind: type[Instruction], data: st.DataObject) -> None:
    one, other = data.draw(scheduled(kind)), data.draw(scheduled(kind))
    assert (one == other) == np.array_equal(encode(one), encode(other))


@ANY_KIND
def test_no_two_fields_share_a_word(kind: type[Instruction]) -> None:
    """Every number of a full record is another one; each must be found in its own word."""
    names = [field.name for field in fields(kind)]
    instruction = kind(**{name: 1000 + n for n, name in enumerate(names)})
    own_waits = tuple(Wait(2000 + j, 3000 + j, j % 2) for j in range(MAX_WAITS))
    item = Scheduled(instruction, 1, 2, 3, Wait(4, 5, 1), own_waits, tuple(4000 + j for j in range(MAX_SIGNALS)), True)
    words = encode(item).tolist()
    assert words[Word.OPCODE] == kind.OPCODE and words[Word.LAYER] == instruction.layer
    assert [words[place] for place in (Word.PAGE, Word.PAGES, Word.TAPE, Word.LOAD_WAIT, Word.LOAD_TARGET)] == [1, 2, 3, 4, 5]
    assert words[Word.WAITS] == MAX_WAITS and words[Word.LAGS] == 0b10
    assert words[Word.WAIT : Word.WAIT + MAX_WAITS] == [2000, 2001]
    assert words[Word.TARGET : Word.TARGET + MAX_WAITS] == [3000, 3001]
    assert words[Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS] == [4000, 4001]
    assert words[Word.RELEASE] == 1
    payload = [getattr(instruction, name) for name in kind.payload_names()]
    assert words[Word.PAYLOAD :] == payload + [0] * (WORDS - Word.PAYLOAD - len(payload))


def test_an_empty_record_names_no_counter() -> None:
    words = encode(Scheduled(Embed(0))).tolist()
    counters = [Word.LOAD_WAIT, *range(Word.WAIT, Word.WAIT + MAX_WAITS), *range(Word.SIGNAL, Word.SIGNAL + MAX_SIGNALS)]
    assert all(words[place] == NONE for place in counters)


@ANY_KIND
@given(data=st.data())
def test_encode_refuses_fields_that_do_not_fit(kind: type[Instruction], data: st.DataObject) -> None:
    item = data.draw(scheduled(kind))
    name = data.draw(st.sampled_from([field.name for field in fields(kind)]))
    wrong: dict[str, Any] = {name: data.draw(NOT_NUMBERS)}
    with pytest.raises(CodecError, match=kind.__name__) as caught:
        encode(replace(item, instruction=replace(item.instruction, **wrong)))
    assert "\n" not in str(caught.value)


@given(data=st.data(), name=st.sampled_from(["page", "pages", "tape", "load_wait", "target", "wait", "signals"]))
def test_encode_refuses_numbers_that_do_not_fit(data: st.DataObject, name: str) -> None:
    wrong: Any = data.draw(NOT_NUMBERS)
    changes: dict[str, dict[str, Any]] = {
        "load_wait": {"load_wait": Wait(wrong, 1, 1)},
        "target": {"waits": (Wait(0, wrong),)},
        "wait": {"waits": (Wait(wrong, 1),)},
        "signals": {"signals": (wrong,)},
    }
    with pytest.raises(CodecError):
        encode(Scheduled(Embed(0), **changes.get(name, {name: wrong})))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"waits": (Wait(0, 1),) * (MAX_WAITS + 1)}, "3 waits and 0 signals do not fit"),
        ({"signals": (1,) * (MAX_SIGNALS + 1)}, "0 waits and 3 signals do not fit"),
        ({"waits": (Wait(0, 1, 2),)}, "a wait is for this token or the one before"),
        ({"waits": (Wait(0, 1, -1),)}, "a wait is for this token or the one before"),
        ({"load_wait": Wait(0, 1, 0)}, "a load wait for the one before"),
    ],
)
def test_encode_refuses_lists_and_lags_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        encode(Scheduled(LmHead(0, 1, 2, 3), **wrong))


@given(st.integers(-(2**31), INT32_MAX).filter(lambda opcode: opcode not in BY_OPCODE))
def test_decode_refuses_an_unknown_opcode(opcode: int) -> None:
    words = encode(Scheduled(Embed(0)))
    words[Word.OPCODE] = opcode
    with pytest.raises(CodecError, match=f"unknown opcode {opcode}"):
        decode(words)


@pytest.mark.parametrize("count", [-1, MAX_WAITS + 1, INT32_MAX])
def test_decode_refuses_more_waits_than_there_is_room_for(count: int) -> None:
    words = encode(Scheduled(Embed(0)))
    words[Word.WAITS] = count
    with pytest.raises(CodecError, match=f"{count} waits"):
        decode(words)


@ANY_KIND
@given(data=st.data())
def test_the_text_says_every_number(kind: type[Instruction], data: st.DataObject) -> None:
    item = data.draw(scheduled(kind))
    text = disassemble(item)
    assert text.split()[0] == kind.MNEMONIC and "\n" not in text
    for field in fields(kind):
        assert f" {field.name}={getattr(item.instruction, field.name)}" in text
    if item.pages:
        assert f" pages={item.page}+{item.pages} from={item.tape}" in text
    found = re.findall(r" (load-wait|wait|signal|release)=c(\d+)(?:>=(\d+)\*(previous|epoch))?", text)
    wanted = [("load-wait", item.load_wait)] if item.load_wait else []
    wanted += [("wait", wait) for wait in item.waits]
    said = [(word, str(w.counter), str(w.target), "previous" if w.lag else "epoch") for word, w in wanted]
    assert found == said + [("release" if item.release else "signal", str(counter), "", "") for counter in item.signals]


@given(NUMBERS, st.integers(1, 1000), st.integers(0, 1), st.integers(0, 10000))
def test_thresholds_count_tokens(counter: int, target: int, lag: int, epoch: int) -> None:
    """A producer signals once a token: by token `epoch` there were `target` signals a token, this one included if no lag."""
    assert Wait(counter, target, lag).threshold(epoch) == sum(target for _ in range(epoch + 1 - lag))


@ANY_KIND
def test_instructions_are_frozen_numbers_with_a_meaning(kind: type[Instruction]) -> None:
    """Frozen and hashable, registered under an opcode and a mnemonic of its own, documented, its fields within a record."""
    instruction = kind(**{field.name: 0 for field in fields(kind)})
    assert hash(instruction) == hash(replace(instruction))
    with pytest.raises(FrozenInstanceError):
        instruction.layer = 1  # type: ignore[misc]
    assert BY_OPCODE[kind.OPCODE] is kind and kind.OPCODE > 0
    assert len({other.MNEMONIC for other in INSTRUCTIONS}) == len({other.OPCODE for other in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert len(kind.payload_names()) <= WORDS - Word.PAYLOAD
    assert kind.__doc__ and all(field.type == "int" for field in fields(kind))
