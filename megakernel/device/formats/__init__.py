"""The device side of `models.formats`: how a page of each format becomes products, one file a format.

A twin has the names below; the kernel takes it as a compile-time constant, with the matrix, and calls its functions, so nothing
else knows what a page holds.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.experimental.gluon import language as gl

from megakernel.device.formats import fp8, int4, plain, q4_0, q4_1, q8_0
from models.formats import WeightFormat

FUNCTIONS = ("stage_sums", "activation", "nothing", "take", "product", "total", "copy_beside")
PACKED_FUNCTIONS = ("numbers",)  # of formats that are not plain
COLUMN_FUNCTIONS = ("stage_columns", "with_staged", "with_words")  # of those that several columns share
TOGETHER = 2048  # columns whose pages are unrolled together
MODULES: dict[str, ModuleType] = {"bf16": plain, "fp8": fp8, "int4": int4, "q8_0": q8_0, "q4_0": q4_0, "q4_1": q4_1}


class Twin:
    """What device functions are told of a format.

    TILES: of a page; COLUMNS: of a page; LANE: columns that a lane holds side by side; STAGED: those that lie together where
    the vector is staged (`megakernel.device.formats.layouts.staged`); TOGETHER: most pages whose loads are unrolled together;
    BESIDE: bytes copied with each page; and the functions: `stage_sums` keeps the sums of the staged vector that a product
    needs, `activation` loads page `page` of the vector as the B operand, `take` what a slot of the ring holds, `product` adds
    the product of the two to accumulators, which begin as `nothing`, `total` makes of them the sums of some tiles, fp32 [tiles,
    16 rows, 8 columns]; `copy_beside` asks for what lies beside a page.  Of several columns `stage_columns` keeps the sums of
    staged pages, and `with_staged` and `with_words` make of a page's B operand what `product` takes, the operand staged or not.
    """

    def __init__(self, format: WeightFormat) -> None:
        module = MODULES[format.name]
        self.TILES, self.COLUMNS = module.TILES, gl.constexpr(format.columns)
        self.LANE, self.STAGED = module.LANE, module.STAGED
        self.TOGETHER = gl.constexpr(max(1, TOGETHER // format.columns))
        self.BESIDE = gl.constexpr(4 * format.scale_words)
        names = (*FUNCTIONS, *(() if format.plain else PACKED_FUNCTIONS), *(COLUMN_FUNCTIONS if format.several else ()))
        self.functions: dict[str, Any] = {name: getattr(module, name) for name in names}
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
