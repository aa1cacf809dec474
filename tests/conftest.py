"""What all tests share: who may use the GPU, which tests share a process, and where the second Triton lies."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# A shell starts its background jobs deaf to interrupts, and they stay so in whatever they start: tests of Ctrl-C would fail.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is bundled, where a test names no model: none may need the network.
os.environ["MEGAKERNEL_MODEL"] = "bundled"

HOPPER = (9, 0)
TOGETHER = (
    "tests/gpu/",  # a persistent kernel wants all SMs, so two processes must not share them
    "tests/scheduler/draw/",  # one browser, and the large drawing made once
    "tests/serving/",  # the same servers for all
)
COMPILED = "tests/megakernel/test_compile.py::"  # under several versions: a model's program is made once


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


@functools.cache
def smollm2_is_there() -> bool:
    from models.smollm2 import cached

    return cached() is not None


def group_of(test: str) -> str:
    """Tests of one group run in one process, one after the other; most are a group of their own.

    test: a node id.  Told by the name alone, because the process that deals the tests out knows no more of them; and not with
    xdist's own marks, which change the node id, as pytest 9.2 no longer allows.
    """
    for folder in TOGETHER:
        if test.startswith(folder):
            return folder
    if test.startswith(COMPILED) and "[" in test:
        return COMPILED + test.partition("[")[2].rpartition("-")[0]  # name-version
    return test


@pytest.hookimpl(optionalhook=True)  # without xdist nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What deals the tests out to processes under `--dist loadgroup`; None: whatever else was asked for."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU test elsewhere would not share the process of the others."""
    strays = [item.nodeid for item in items if item.get_closest_marker("gpu") and not item.nodeid.startswith("tests/gpu/")]
    if strays:
        raise pytest.UsageError(f"tests marked gpu belong into tests/gpu/: {', '.join(strays)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := missing_gpu()):
        pytest.skip(reason)
    if item.get_closest_marker("full") and not os.environ.get("MEGAKERNEL_FULL"):
        pytest.skip("left out to save time: MEGAKERNEL_FULL=1 asks for it")
    if item.get_closest_marker("smollm2") and not smollm2_is_there():
        pytest.skip("needs SmolLM2-135M-Instruct in the cache: python -m models.smollm2 fetches it")


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
