"""Prefill's kernels compiled for Hopper with no GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from megakernel.compile import resources
from megakernel.device.grouped.product import BOX, SMALL_BOX
from megakernel.device.prefill.along import read_widened
from megakernel.device.prefill.attention import read_attention
from megakernel.device.prefill.embedding import read_embedding
from megakernel.device.prefill.experts import read_experts
from megakernel.device.prefill.gathering import read_rows, read_sum
from megakernel.device.prefill.heads import read_heads
from megakernel.device.prefill.past import add_parts, read_past
from megakernel.device.prefill.projections import read_product
from megakernel.device.prefill.routing import read_choice, read_places
from megakernel.device.prefill.single import read_single
from megakernel.device.prefill.widening import widen_experts, widen_matrix
from megakernel.geometry import Geometry
from megakernel.grouped import tiling as grouped
from megakernel.options import BOX_LAYOUT, TMA_LAYOUT, Sizes
from megakernel.prefill.launch import LAUNCH_OPTIONS
from megakernel.prefill.plan import EXPERT_KINDS, Plan
from megakernel.prefill.tiling import CONSUMER_TOKENS, STEP, AttentionTiling, Tiling, Widening
from models.tape import BLOCK_ROWS

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
    "out": "*bf16",  # of attention; of `read_single` fp32
    "products": "*fp32",
    "scores": "*fp32",
    "slots": "*i32",
    "shares": "*fp32",
    "counts": "*i32",
    "places": "*i32",
    "ends": "*i32",
    "rows": "*bf16",
    "row_shares": "*fp32",
    "outputs": "*bf16",
    "offsets": "*i32",
    "y": "*bf16",
    "weights": "*bf16",
    "tape": "*i32",
    "widened": "*bf16",
    "tokens": "*i32",
    "sums": "*fp32",
}
ALIGNED = ("n", "k", "stride")  # numbers that are multiples of 16

AnyTiling = Tiling | AttentionTiling | Widening | grouped.Tiling


def box(shape: tuple[int, ...], layout: Any) -> str:
    """A tensor map's type."""
    return f"tensordesc<bf16[{', '.join(str(size) for size in shape)}],{layout!r}>"


def compile_for_hopper(kernel: Any, sizes: Sizes, tiling: AnyTiling, widening: Widening | None = None, **options: Any) -> Any:
    """One of prefill's kernels for compute capability 9.0; `widening` for one that widens."""
    types: dict[str, str] = {**POINTERS, "S": "constexpr", "T": "constexpr", "A": "constexpr", "W": "constexpr"}
    if isinstance(tiling, Tiling):
        types["x"] = box((tiling.tokens, STEP), TMA_LAYOUT)
        types["w"] = box((1, tiling.tile // BLOCK_ROWS, BLOCK_ROWS, STEP), BOX_LAYOUT)
        types["out"] = "*fp32"
    elif isinstance(tiling, AttentionTiling):
        types["queries"] = box((CONSUMER_TOKENS, tiling.width), TMA_LAYOUT)
        types["cache"] = box((tiling.tiles, tiling.pages, tiling.page_positions, STEP), BOX_LAYOUT)
    elif isinstance(tiling, grouped.Tiling):
        types["x"], types["few"] = (box((rows, STEP), TMA_LAYOUT) for rows in (BOX.value, SMALL_BOX.value))
        types["w"] = box((1, grouped.TILE_ROWS // BLOCK_ROWS, BLOCK_ROWS, STEP), BOX_LAYOUT)
        types["rows"] = "i32"
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    values = {"S": sizes, "T": Sizes(tiling), "A": Sizes(tiling), "W": Sizes(widening or tiling)}
    constants = {(names.index(name),): value for name, value in values.items() if name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ALIGNED]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**LAUNCH_OPTIONS, **options})


def kernels(plan: Plan) -> list[tuple[Any, AnyTiling, Widening | None]]:
    """Every kernel that a model's prefill compiles, its tiling, and how it widens a matrix."""
    found: dict[tuple[Any, AnyTiling, Widening | None], None] = {
        (read_embedding, plan.embedding, None): None,
        (read_attention, plan.attention, None): None,
    }
    for past in filter(None, map(plan.past, plan.classes)):
        found |= {(read_past, past, None): None, (add_parts, past, None): None}
    if plan.dimensions.norms_together:
        found[read_heads, plan.embedding, None] = None
    for kind in plan.kinds:
        widening = plan.widening(kind) if kind in plan.buffers else None
        if widening is not None:
            found[widen_matrix, widening, widening] = None
        for size in plan.classes:
            tiling = plan.tiling(kind, plan.cut(size, kind))
            if tiling.kind == "single":
                found[read_single, tiling, None] = None
            else:
                found[read_widened if plan.widened else read_product, tiling, widening] = None
    if plan.config.num_experts:
        found |= {(kernel, plan.embedding, None): None for kernel in (read_choice, read_places, read_rows, read_sum)}
        found |= {(read_experts, plan.grouped_tiling(kind), None): None for kind in EXPERT_KINDS}
        widenings = [plan.widening(kind) for kind in EXPERT_KINDS if plan.widened]
        found |= {(widen_experts, widening, widening): None for widening in widenings}
    return list(found)


def describe(geometry: Geometry, plan: Plan, only: Collection[str] = ()) -> list[dict[str, Any]]:
    """Compile all of a model's kernels, or `only` those of some names, and report each, as JSON-ready values: its tiling, and
    what it needs."""
    sizes = Sizes(geometry)
    return [
        {
            "triton": triton.__version__,
            "kernel": kernel.__name__,
            "tiling": asdict(tiling),
            **asdict(resources(compile_for_hopper(kernel, sizes, tiling, widening))),
        }
        for kernel, tiling, widening in kernels(plan)
        if not only or kernel.__name__ in only
    ]
