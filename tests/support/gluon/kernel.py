"""The megakernel in the GPU's place: launched as the kernel is, on tensors of the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tests.support.gluon.grid import Grid
from tests.support.gluon.language import CURRENT, Place, emulated
from tests.support.gluon.memory import Block, Descriptor, Swizzled
from tests.support.gluon.tensor import Pointer, Tensor


@cache
def device() -> tuple[Any, Any]:
    """The kernel, and what makes its sizes of a geometry, both of the device's own source."""
    with emulated() as module:
        kernel, options = module("megakernel.device.kernel"), module("megakernel.options")
        module("megakernel.device.formats").Twin.value = property(lambda twin: twin)
    return kernel.megakernel, options.Sizes


def argument(value: Any) -> Any:
    """An argument of a launch as device functions see it."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1))
    if hasattr(value, "block_shape"):
        swizzled = value.layout.swizzle_byte_width == 128
        return Descriptor(value.base, list(value.block_shape), Swizzled(8, 1, 8 if swizzled else 1))
    if isinstance(value, int):
        return Tensor(torch.tensor(value, dtype=torch.int64 if abs(value) >= 2**31 else torch.int32))
    return value


class EmulatedKernel:
    """Called as the kernel is; runs to its end at once, its actors in the order that a seed says."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.launches, self.steps = seed, 0, 0

    def warmup(self, *arguments: Any, **options: Any) -> None:
        """Nothing to compile."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            megakernel, sizes = device()
            *given, geometry = arguments
            seen = [argument(value) for value in given]
            self.launches += 1
            actors = Grid(self.seed + self.launches)
            S = sizes(geometry.geometry)

            def block(number: int) -> tuple[Block, Any]:
                shared = Block()

                def live() -> None:
                    CURRENT.place = Place(actors, number, grid[0], shared)
                    megakernel(*seen, S)

                return shared, live

            actors.run([block(number) for number in range(grid[0])])
            self.steps += actors.steps

        return launch
