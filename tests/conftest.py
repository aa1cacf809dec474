"""What all tests share: who may use the GPU, and where the second Triton lies."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

HOPPER = (9, 0)


@functools.cache
def missing_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None where they can."""
    import torch  # here, because most runs of a single test file need neither torch nor its two seconds

    if not torch.cuda.is_available():
        return "needs an NVIDIA Hopper GPU: torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability[0] != HOPPER[0]:
        return f"needs an NVIDIA Hopper GPU (sm_90): {torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker gets every GPU test: a persistent kernel wants all SMs, so two processes must not share them."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := missing_gpu()):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def triton_site() -> Callable[[str], Path]:
    """`triton_site("3.9.0")` is the folder that a subprocess puts on its PYTHONPATH to import that Triton.

    Either the one installed in the environment or the one that scripts/environment.py puts beside it, in
    `triton-<version>`.  Where there is neither the test is skipped, but fails in CI: there a skip would go unnoticed.
    """

    def find(version: str) -> Path:
        beside = Path(sys.prefix) / f"triton-{version}"
        if (beside / "triton" / "__init__.py").exists():
            return beside
        try:
            installed = metadata.distribution("triton")
        except metadata.PackageNotFoundError:
            installed = None
        if installed is not None and installed.version == version:
            return Path(str(installed.locate_file("")))
        reason = f"needs triton {version} in {beside}: scripts/test installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return find
