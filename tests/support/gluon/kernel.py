"""The megakernel and prefill's kernels in the GPU's place: launched as they are, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from megakernel.prefill.launch import Launch
from megakernel.prefill.prefill import Prefill
from tests.support import ROOT
from tests.support.gluon.grid import Grid
from tests.support.gluon.language import CURRENT, DEVICE, Place, emulated, nvmma_layout
from tests.support.gluon.memory import Block, Descriptor
from tests.support.gluon.tensor import Pointer, Tensor

FOLDER = ROOT / "megakernel" / "device" / "prefill"


@cache
def package() -> dict[str, ModuleType]:
    """Device modules that hold kernels, and `megakernel.options`, made of the device's own source."""
    names = [f"{DEVICE}.prefill.{path.stem}" for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    with emulated() as module:
        names += [f"{DEVICE}.{name}" for name in ("kernel", "formats", "formats.layouts")] + ["megakernel.options"]
        found = {name: module(name) for name in names}
        module("megakernel.device.formats").Twin.value = property(lambda twin: twin)
    found["megakernel.options"].Sizes.value = property(lambda sizes: sizes)
    return found


def argument(value: Any) -> Any:
    """An argument of a launch as device functions see it."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1))
    if hasattr(value, "block_shape"):
        elements = torch.as_strided(value.base, value.shape, value.strides, value.base.storage_offset())
        layout = nvmma_layout(value.layout.swizzle_byte_width, value.layout.element_bitwidth, value.layout.rank)
        return Descriptor(elements, list(value.block_shape), layout)
    if isinstance(value, int):
        return Tensor(torch.tensor(value, dtype=torch.int64 if abs(value) >= 2**31 else torch.int32))
    if hasattr(value, "geometry"):
        return package()["megakernel.options"].Sizes(value.geometry)
    return value


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], seed: int = 0) -> int:
    """Run a kernel of the device's source to its end; returns how many steps its actors took."""
    grid, seen = Grid(seed), [argument(value) for value in arguments]

    def block(number: int) -> tuple[Block, Callable[[], None]]:
        shared = Block()

        def live() -> None:
            CURRENT.place = Place(grid, number, programs, shared)
            kernel(*seen)

        return shared, live

    grid.run([block(number) for number in range(programs)])
    return grid.steps


def alone(body: Callable[[], None], seed: int = 0) -> None:
    """Run what calls device functions, as the one role of a block of its own."""
    launch(body, 1, (), seed)


def run(one: Launch, seed: int = 0) -> None:
    """One of prefill's launches."""
    function = one.kernel.fn
    launch(getattr(package()[function.__module__], function.__name__), one.grid, one.arguments, seed)


class EmulatedPrefill(Prefill):
    """Prefill's chain, kernel by kernel."""

    seed = 0

    def compile(self) -> None:
        """Nothing to compile."""

    def capture(self, launches: list[Launch]) -> Any:
        """Nothing to capture."""

    def read(self, start: int, count: int) -> None:
        self.chain.words.copy_(torch.tensor([start, count], dtype=torch.int32))
        for one in self.chains()[self.which(start, count)]:
            self.seed += 1
            run(one, self.seed)


class EmulatedKernel:
    """Called as the kernel is; runs to its end at once, its actors in the order that a seed says."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.launches, self.steps = seed, 0, 0

    def warmup(self, *arguments: Any, **options: Any) -> None:
        """Nothing to compile."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.launches += 1
            kernel = package()[f"{DEVICE}.kernel"].megakernel
            self.steps += launch(kernel, grid[0], arguments, self.seed + self.launches)

        return run
