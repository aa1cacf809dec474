"""docs/instructions.md names every instruction, field, buffer and word there is, with the right numbers."""

from __future__ import annotations

import re

import pytest

from instructions.base import Instruction
from instructions.codec import MAX_SIGNALS, MAX_WAITS, WORDS, Word
from instructions.registry import INSTRUCTIONS
from tests.support import ROOT
from tests.support.fake_machine import small_shape

TEXT = (ROOT / "docs" / "instructions.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two head lines."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.MNEMONIC)
def test_every_instruction_has_its_row(kind: type[Instruction]) -> None:
    (row,) = [cells for cells in rows("The table") if cells[1] == f"`{kind.MNEMONIC}`"]
    assert row[0] == str(kind.OPCODE)
    assert re.findall(r"`(\w+)`", row[2]) == list(kind.payload_names())
    assert row[5], "a formula"


def test_no_row_is_for_nothing() -> None:
    assert len(rows("The table")) == len(INSTRUCTIONS)


def test_every_word_has_its_place() -> None:
    ends = [*list(Word)[1:], WORDS]
    sizes = {Word.WAIT: MAX_WAITS, Word.TARGET: MAX_WAITS, Word.SIGNAL: MAX_SIGNALS}
    wanted = []
    for word, end in zip(Word, ends, strict=True):
        assert int(end) - word == sizes.get(word, int(end) - word if word is Word.PAYLOAD else 1)
        wanted.append([str(int(word)) if end - word == 1 else f"{int(word)} – {int(end) - 1}", f"`{word.name}`"])
    assert [cells[:2] for cells in rows("Words")] == wanted
    assert f"A record is {WORDS} int32 words" in TEXT


def test_every_buffer_has_its_row() -> None:
    names = [cells[0] for cells in rows("Buffers")]
    assert names == [f"`{name}`" for name in small_shape("mha", slices=2).buffers]
