"""Prefill's kernels compiled for Hopper with no GPU."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from megakernel.device.prefill.attention import read_attention
from megakernel.options import OPTIONS, TMA_LAYOUT, Sizes
from megakernel.prefill.prefill import WEIGHTS_LAYOUT
from megakernel.prefill.tiling import AttentionTiling, Tiling

POINTERS = {
    "chunk": "*i32",
    "tiles": "*i32",
    "parts": "*fp32",
    "arrivals": "*i32",
    "residual": "*fp32",
    "normed": "*bf16",
    "squares": "*fp32",
    "queries": "*bf16",
    "units": "*bf16",
    "constants": "*fp32",
    "rope": "*fp32",
    "cache": "*bf16",
    "out": "*bf16",
    "weights": "*bf16",
    "tokens": "*i32",
}


def box(shape: tuple[int, ...], layout: Any) -> str:
    """A tensor map's type."""
    return f"tensordesc<bf16[{', '.join(str(size) for size in shape)}],{layout!r}>"


def compile_for_hopper(kernel: Any, sizes: Sizes, tiling: Tiling | AttentionTiling, **options: Any) -> Any:
    """One of prefill's kernels for compute capability 9.0."""
    types: dict[str, str] = {**POINTERS, "S": "constexpr", "T": "constexpr", "A": "constexpr"}
    if isinstance(tiling, Tiling):
        types["x"] = box((tiling.tokens, 64), TMA_LAYOUT)
        types["w"] = box((1, tiling.tile // 16, 16, 64), WEIGHTS_LAYOUT)
    else:
        types["queries"] = box((64, tiling.width), TMA_LAYOUT)
        types["cache"] = box((tiling.tiles, tiling.pages, tiling.page_positions, 64), WEIGHTS_LAYOUT)
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    values = {"S": sizes, "T": Sizes(tiling), "A": Sizes(tiling)}
    constants = {(names.index(name),): value for name, value in values.items() if name in names}
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **OPTIONS, **options})


__all__ = ["compile_for_hopper", "read_attention"]
