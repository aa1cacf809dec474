"""The grouped product compiled for Hopper with no GPU.

    python -m megakernel.grouped.compile

prints what it needs, as JSON, for bf16 and for e4m3, under the Triton that is installed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from megakernel.compile import resources
from megakernel.device.grouped.product import grouped_kernel
from megakernel.grouped.tiling import TILE_ROWS, Plan, Tiling
from megakernel.options import BYTES_LAYOUT, OPTIONS, TMA_LAYOUT, WARPS, Sizes

POINTERS = {"offsets": "*i32", "y": "*bf16", "x_scale": "*fp32", "w_scale": "*fp32"}
ALIGNED = (*POINTERS, "n", "k")


def compile_for_hopper(tiling: Tiling, **options: Any) -> Any:
    """The kernel for compute capability 9.0; `options` are Triton's own, beside those that every launch uses."""

    def box(rows: int) -> str:
        element, layout = ("fp8e4nv", BYTES_LAYOUT) if tiling.scaled else ("bf16", TMA_LAYOUT)
        return f"tensordesc<{element}[{rows}, {tiling.step}],{layout!r}>"

    types = {"x": box(64), "few": box(16), "w": box(TILE_ROWS), **POINTERS, "T": "constexpr"}
    names = grouped_kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    constants = {(names.index("T"),): Sizes(tiling)}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    source = GluonASTSource(fn=grouped_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS, **OPTIONS, **options})


def describe(tiling: Tiling) -> dict[str, Any]:
    """What the kernel needs, as JSON-ready values."""
    return {"triton": triton.__version__, **asdict(tiling), **asdict(resources(compile_for_hopper(tiling)))}


if __name__ == "__main__":
    for itemsize in (2, 1):
        print(json.dumps(describe(Plan(132).tiling(128, itemsize))))
