"""What compiling the kernel and launching it have in common on the host: its sizes, its warps, its options, its tensor maps."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl

from megakernel.device.formats import twin_of
from models.formats import WeightFormat

WARPS = 4  # of the consumer
# Compiler options of every launch.  Fusing a product and a sum into one FMA was the default, from 3.10 on it is asked for.
OPTIONS = {"enable_fp_fusion": True}
TMA_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # of a page, as the descriptors say it
BYTES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)  # the same, of elements of a byte
# The same of boxes of row blocks, or of pages of the cache, by one tile.
BOX_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
BESIDE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)  # and of what lies beside it


def constants(numbers: Any) -> dict[str, gl.constexpr]:
    """The fields of a dataclass or named tuple as compile-time constants, those within its fields too."""
    table = {name: getattr(numbers, name) for name in type(numbers).__annotations__}
    return {name: gl.constexpr(constant(value)) for name, value in table.items()}


def constant(value: Any) -> Any:
    """A number as it is, a tuple of them as such constants, a format as its twin."""
    if isinstance(value, tuple):
        return Sizes(value)
    return twin_of(value) if isinstance(value, WeightFormat) else value


class Sizes:
    """A `Geometry`, a part of it or other numbers, as a kernel takes them: compile-time constants in the device functions."""

    def __init__(self, geometry: Any) -> None:
        self.geometry = geometry
        vars(self).update(constants(geometry))

    def __repr__(self) -> str:
        return f"{self.geometry!r} {[value.value for value in vars(self).values() if isinstance(value, gl.constexpr)]}"

    def __hash__(self) -> int:
        return hash(self.geometry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sizes) and self.geometry == other.geometry
