"""One kernel of a chunk's chain, with all that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megakernel.options import OPTIONS, Sizes

WIDENERS = 4  # blocks of a widening kernel that fit an SM
ROW_BLOCKS = 8  # of a kernel that goes row by row, on an SM
LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": 4, **OPTIONS}


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments; `early` where it may begin while the kernel before it ends."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    early: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Triton's."""
        return {**LAUNCH_OPTIONS, "launch_pdl": self.early}

    def enqueue(self) -> None:
        """On the current stream."""
        self.kernel[(self.grid,)](*self.arguments, **self.options)

    def compile(self) -> None:
        """Compile, or find what was compiled in Triton's cache."""
        self.kernel.warmup(*self.arguments, grid=(self.grid,), **self.options)

    @property
    def compiled(self) -> tuple[Any, ...]:
        """What tells its compiled kernel from others."""
        sizes = [argument for argument in self.arguments if isinstance(argument, Sizes)]
        boxes = [tuple(argument.block_shape) for argument in self.arguments if isinstance(argument, TensorDescriptor)]
        return (self.kernel, self.early, *sizes, *boxes)
