"""A sample of the campaign of drafts; `python -m tests.megakernel.drafted` runs the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megakernel.gpu.columns import ColumnFlight, Landed
from megakernel.gpu.control import Outcome
from tests.megakernel import drafted


@pytest.mark.parametrize(("device", "prompts"), [("vm", 3), ("fake", 30)])
def test_texts_are_the_same_with_drafts_and_without(device: str, prompts: int) -> None:
    outcome = drafted.run(device, prompts, seed=1)
    assert outcome.wrong == []
    assert outcome.requests == prompts and outcome.sampled == prompts // 2
    assert outcome.steps < outcome.tokens, "some drafts were right"


def test_a_text_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a launch with drafts is another one."""
    landed = ColumnFlight.of_sequence

    def spoilt(self: ColumnFlight, outcome: Outcome, number: int) -> Landed:
        found = landed(self, outcome, number)
        return found if found.stopped or not found.tokens else replace(found, tokens=[*found.tokens[:-1], found.tokens[-1] ^ 1])

    monkeypatch.setattr(ColumnFlight, "of_sequence", spoilt)
    assert drafted.run("fake", 4, seed=1).wrong
