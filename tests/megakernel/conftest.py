"""Tests here leave a GPU alone: what plain PyTorch does on one is tested in `tests/gpu/`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megakernel import loading


@pytest.fixture(scope="session", autouse=True)
def pytorch_on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "best_device", lambda: torch.device("cpu"))
        yield
