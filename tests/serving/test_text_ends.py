"""Where an answer's text ends: stop strings across any edges, end tokens, characters of several tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakernel.request import SamplingParams
from megakernel.text import ModelText
from serving.choice import Choice
from serving.job import Burst, Job
from serving.stops import StopFinder
from tests.support import BUNDLED
from tests.support.cli_fakes import EOS, ids_of

LETTERS = st.text("ab\n", max_size=12)
TEXT = "One naïve 日本 😀 list, two lists, three."


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_stop_string_that_is_whole_first(pieces: list[str], stops: list[str]) -> None:
    finder, shown, whole = StopFinder(stops), "", "".join(pieces)
    for number, piece in enumerate(pieces):
        shown += finder.step(piece)
        seen = "".join(pieces[: number + 1])
        assert seen.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if not finder.found:
            held = seen[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in stops), "held back without need"
    shown += finder.finish()
    ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    assert finder.found == bool(ends)
    assert shown == (whole[: min(ends)[1]] if ends else whole)


def answer(tokens: list[int], size: int, stops: list[str], finish: str) -> tuple[str, Choice]:
    """Text and choice of an answer whose tokens come `size` at a time."""
    job = Job([0, 5], 99, SamplingParams(), "a", lambda event: None)
    choice, shown = Choice(job, ModelText(BUNDLED), stops), ""
    for start in range(0, len(tokens), size):
        last = start + size >= len(tokens)
        shown += choice.take(Burst(job, tokens[start : start + size], finish if last else None, 0, 0.0))
        if choice.finish:
            break
    return shown, choice


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("stops", "shown", "finish"),
    [
        ([], TEXT, "stop"),
        (["four"], TEXT, "stop"),
        (["lists"], "One naïve 日本 😀 list, two ", "stop"),
        (["three", "two lists, th"], "One naïve 日本 😀 list, ", "stop"),
        (["😀"], "One naïve 日本 ", "stop"),
        ([TEXT[-1]], TEXT[:-1], "stop"),
    ],
)
def test_stop_strings_are_found_however_the_tokens_come(size: int, stops: list[str], shown: str, finish: str) -> None:
    found, choice = answer([*ids_of(TEXT), EOS], size, stops, "stop")
    assert (found.strip(), choice.finish) == (shown.strip(), finish)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_tokens_after_a_stop_string_do_not_count(size: int) -> None:
    _, choice = answer(ids_of(TEXT), size, ["lists"], "length")
    counted = next(count for count in range(99) if "lists" in ModelText(BUNDLED).decode(ids_of(TEXT)[:count]))
    assert choice.tokens == counted


@pytest.mark.parametrize("stops", [[], ["nowhere"]])
def test_the_end_token_counts_and_is_not_shown(stops: list[str]) -> None:
    shown, choice = answer([*ids_of("a b c"), EOS], 16, stops, "stop")
    assert shown == "a b c" and choice.tokens == len(ids_of("a b c")) + 1


@pytest.mark.parametrize("stops", [[], ["nowhere"]])
@pytest.mark.parametrize("size", [1, 16])
def test_an_unfinished_character_is_shown_as_lost(stops: list[str], size: int) -> None:
    cut = ids_of("a 😀")[:-1]
    shown, choice = answer(cut, size, stops, "length")
    assert choice.finish == "length" and shown.startswith("a ") and set(shown[2:]) == {"\N{REPLACEMENT CHARACTER}"}
    assert choice.tokens == len(cut)
