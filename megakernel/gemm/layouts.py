"""How the operands of a skinny product lie in shared memory, and Triton's options of its launch."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl

from megakernel.options import OPTIONS

LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": 4, **OPTIONS}


def operand_layout(wide: bool) -> gl.NVMMASharedLayout:
    """Of a box: lines of 128 bytes, swizzled as TMA and the matrix instruction do it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16 if wide else 8, rank=2)
