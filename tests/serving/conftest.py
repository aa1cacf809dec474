"""Two servers for all tests: one with a model, one that is told what to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import SERVE, Served, served


@pytest.fixture(scope="session")
def model_server() -> Iterator[Served]:
    """The bundled model in plain PyTorch."""
    with served("--context", "512", program=SERVE) as server:
        yield server


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[Served]:
    """Tokens that are a function of the prompt; see `tests.support.scripted`."""
    with served() as server:
        yield server
