"""Where a row of the KV cache lies, and what may be stored there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.plain import TILE
from megakernel.device.matvec import PAGE_ELEMENTS

LARGEST = gl.constexpr(3.3895313892515355e38)  # of bf16


@gluon.jit
def cache_address(S: gl.constexpr, cache, head_pages, layer, head, value, position, row):
    """Where the cache holds row `row` of a K (value 0) or V (value 1) head at one position."""
    page = ((layer * S.kv_heads + head) * 2 + value) * head_pages + position // S.page_positions
    line = (row // TILE) * S.page_positions + position % S.page_positions
    return cache + page.to(gl.int64) * PAGE_ELEMENTS + line * TILE + row % TILE


@gluon.jit
def finite(values):
    """fp32 values within what bf16 can hold; what is no number becomes one.

    The cache holds numbers alone, whatever a request computes: attention weighs rows of a page that are not yet written with
    0, and 0 times infinity is no number.  The request itself fails by its current position, which comes from "new_kv".
    """
    return gl.minimum(gl.maximum(values, -LARGEST), LARGEST)
