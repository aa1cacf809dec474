"""The device side of `models.formats`: how a page of each format becomes products, one file a format.

A twin has the names below; the kernel takes it as a compile-time constant, with the matrix, and calls its functions, so nothing
else knows what a page holds.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.experimental.gluon import language as gl

from megakernel.device.formats import fp8, int4, plain
from models.formats import WeightFormat

FUNCTIONS = ("activation", "take", "product", "copy_beside")
TOGETHER = 2048  # columns whose pages are unrolled together
MODULES: dict[str, ModuleType] = {"bf16": plain, "fp8": fp8, "int4": int4}


class Twin:
    """What device functions are told of a format.

    TILES: of a page, each with its own accumulators; COLUMNS: of a page; TOGETHER: most pages whose loads are unrolled
    together; LANE: columns side by side that a lane takes; BESIDE: bytes copied with each page; and the functions: `activation`
    loads page `page` of the staged vector as the B operand, `take` what a slot of the ring holds, `product` adds the product of
    the two to accumulators, `copy_beside` asks for what lies beside a page.
    """

    def __init__(self, format: WeightFormat) -> None:
        module = MODULES[format.name]
        self.TILES, self.COLUMNS = module.TILES, gl.constexpr(format.columns)
        self.TOGETHER = gl.constexpr(max(1, TOGETHER // format.columns))
        self.LANE = gl.constexpr(2 * getattr(module, "CODES", gl.constexpr(1)).value)
        self.BESIDE = gl.constexpr(4 * format.scale_words)
        self.functions: dict[str, Any] = {name: getattr(module, name) for name in FUNCTIONS}
        vars(self).update(self.functions)

    def __repr__(self) -> str:
        """With the sources of the functions, which Triton's cache would not see otherwise."""
        return f"{self.COLUMNS} {[function.cache_key for function in self.functions.values()]}"


TWINS: dict[str, Twin] = {}


def twin_of(format: WeightFormat) -> Twin:
    """The twin of a format."""
    if format.name not in TWINS:
        TWINS[format.name] = Twin(format)
    return TWINS[format.name]
