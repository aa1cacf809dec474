"""The kernel of a skinny product compiled for Hopper with no GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from megakernel.compile import resources
from megakernel.device.gemm.kernel import skinny_product
from megakernel.gemm.layouts import launch_options, operand_layout
from megakernel.gemm.plan import BOX, CONSUMER_ROWS, Plan
from megakernel.options import Sizes

POINTERS = {
    "y": "*bf16",
    "x_scale": "*fp32",
    "w_scale": "*fp32",
    "parts": "*fp32",
    "arrivals": "*i32",
}


def compile_for_hopper(plan: Plan) -> Any:
    """The kernel of a plan for compute capability 9.0."""
    tiling = plan.tiling
    types: dict[str, str] = {**POINTERS, "T": "constexpr"}
    x = "bf16" if tiling.wide else "fp8e4nv"
    types["x"] = f"tensordesc<{x}[{tiling.tokens}, {BOX}],{operand_layout(tiling.wide)!r}>"
    types["w"] = f"tensordesc<fp8e4nv[{tiling.consumers * CONSUMER_ROWS}, {BOX}],{operand_layout(False)!r}>"
    names = skinny_product.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(
        fn=skinny_product, signature=signature, constexprs={(names.index("T"),): Sizes(tiling)}, attrs=attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch_options(plan))


def describe(plan: Plan) -> dict[str, Any]:
    """Compile and report, as JSON-ready values: the tiling, what it needs, the kinds of matrix instructions in it, and how
    many copies by TMA and conversions from fp16 to bf16 there are."""
    kernel = compile_for_hopper(plan)
    words = kernel.asm["ptx"].split()
    return {
        "triton": triton.__version__,
        "tiling": asdict(plan.tiling),
        **asdict(resources(kernel)),
        "instructions": sorted({word for word in words if word.startswith("wgmma.mma_async")}),
        "tma": sum(word.startswith("cp.async.bulk.tensor") for word in words),
        "slow_conversions": sum(word.startswith("cvt") and word.endswith("bf16.f16") for word in words),
    }
