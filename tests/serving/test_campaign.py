"""A sample of the campaign, on both engines; `python -m tests.serving.campaign` runs the whole."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.campaign import Campaign


@pytest.mark.parametrize(("server", "requests"), [("scripted_server", 100), ("model_server", 30)])
def test_a_seeded_sample_of_the_campaign(server: str, requests: int, request: pytest.FixtureRequest) -> None:
    outcome = asyncio.run(Campaign(request.getfixturevalue(server), requests, seed=7).run())
    assert outcome.wrong == []
    assert outcome.answered + outcome.left + outcome.refused == requests
    assert outcome.left > requests // 10 and outcome.refused > 0
