"""How the operands of a skinny product lie in shared memory, and Triton's options of its launch."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl

from megakernel.gemm.plan import Plan
from megakernel.options import OPTIONS


def launch_options(plan: Plan) -> dict[str, Any]:
    """Triton's: a thread gets all registers there are, unless a second block is to find room."""
    limit = {"maxnreg": plan.registers} if plan.cut.residents > 1 else {}
    return {"num_warps": 4, **limit, **OPTIONS}


def operand_layout(wide: bool) -> gl.NVMMASharedLayout:
    """Of a box: lines of 128 bytes, swizzled as TMA and the matrix instruction do it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16 if wide else 8, rank=2)
