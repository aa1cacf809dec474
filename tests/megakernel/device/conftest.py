"""Small tensors are computed by one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megakernel.torch.threads import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield
