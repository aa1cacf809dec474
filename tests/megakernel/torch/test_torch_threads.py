"""Fewer threads are taken while they are quicker, and what was set before comes back."""

from __future__ import annotations

import pytest
import torch

from megakernel.torch import threads as module
from megakernel.torch.threads import quickest, threads


@pytest.mark.parametrize(
    ("times", "best", "tried"),
    [
        ({8: 1.0, 4: 2.0, 2: 0.1, 1: 0.1}, 8, [8, 4]),
        ({8: 9.0, 4: 3.0, 2: 3.0, 1: 0.1}, 4, [8, 4, 2]),
        ({8: 9.0, 4: 3.0, 2: 2.0, 1: 1.0}, 1, [8, 4, 2, 1]),
        ({3: 9.0, 1: 1.0}, 1, [3, 1]),
        ({1: 1.0}, 1, []),
    ],
)
def test_the_quickest_of_halves(times: dict[int, float], best: int, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(_: object, count: int) -> float:
        asked.append(count)
        return times[count]

    monkeypatch.setattr(module, "seconds", seconds)
    assert quickest(lambda: None, max(times)) == best
    assert asked == tried


def test_a_step_is_timed_on_the_threads_asked_for_and_few_times() -> None:
    before, seen = torch.get_num_threads(), []
    assert module.seconds(lambda: seen.append(torch.get_num_threads()), before + 1) < module.ENOUGH
    assert set(seen) == {before + 1} and 2 <= len(seen) <= module.REPEATS + 1
    assert torch.get_num_threads() == before


def test_an_interrupt_brings_the_threads_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), threads(before + 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before
