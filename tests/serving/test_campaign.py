"""A sample of the campaign, on both engines; `python -m tests.serving.campaign` runs the whole."""

from __future__ import annotations

import pytest

from tests.serving.campaign import campaign


@pytest.mark.parametrize(("scripted", "requests"), [(True, 100), (False, 40)], ids=["scripted", "torch"])
def test_a_seeded_sample_of_the_campaign(scripted: bool, requests: int) -> None:
    outcome = campaign(requests, seed=7, scripted=scripted)
    assert outcome.wrong == []
    assert outcome.answered + outcome.left + outcome.refused == requests
    assert outcome.left > requests // 10 and outcome.refused > requests // 50
