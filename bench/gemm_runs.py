"""What `bench.gemm` measures: a skinny product beside cuBLAS, a plain Triton product and the read floor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.plain_matmul import plain_launches
from bench.read_floor import Floor, measure_floor
from bench.record import Spread
from instructions.dimensions import ceil_div
from megakernel.gemm.gemm import Workspace, skinny_gemm
from megakernel.gemm.operands import FP8
from megakernel.gemm.plan import Plan
from megakernel.gemm.reference import skinny_gemm_ref

COLD_BYTES = 200 << 20  # of copies of W that take turns: four times L2
CALLS = 12  # at least, in a graph
WARM_UPS = 2  # replays before those that count
HEAD_START = 300_000  # clock cycles: the GPU is kept busy until the graph is enqueued
COMPILERS = 8
SAMPLE = 128  # rows of W that are computed in fp64 as well

Way = Callable[[int], object]  # enqueues one product with a copy of W


@dataclass(frozen=True)
class Operands:
    """Random operands of a shape: copies of W, FP8 [copies, rows, columns], and 64 tokens, with their scales."""

    w: torch.Tensor
    w_scale: torch.Tensor
    x: torch.Tensor
    x_scale: torch.Tensor
    narrow: torch.Tensor

    @classmethod
    def random(cls, rows: int, columns: int) -> Operands:
        """As many copies as L2 cannot hold."""
        copies = max(2, ceil_div(COLD_BYTES, rows * columns))
        w = torch.empty(copies, rows, columns, dtype=FP8, device="cuda")
        for copy in w:
            copy.copy_(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"))
        x = torch.randn(64, columns, dtype=torch.bfloat16, device="cuda")
        scales = [0.01 + 0.02 * torch.rand(length, device="cuda") for length in (rows, 64)]
        return cls(w, scales[0], x, scales[1], x.to(FP8))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of W."""
        return self.w.shape[1], self.w.shape[2]

    @property
    def bytes(self) -> int:
        """Of W."""
        return self.w[0].numel()


def microseconds(way: Way, copies: int, repeats: int) -> Spread:
    """Of one product, back to back in a CUDA graph, the copies of W in turn."""
    way(0)
    torch.cuda.synchronize()
    calls = copies * ceil_div(CALLS, copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            way(call % copies)
    times = []
    for _ in range(WARM_UPS + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return Spread.of(times[WARM_UPS:])


def read_floor(operands: Operands) -> Floor:
    """How fast the GPU reads all copies of W."""
    pages = operands.w.view(torch.uint8).view(-1)
    return measure_floor(pages, pages[:0])


def our_way(operands: Operands, plan: Plan, early: bool) -> Way:
    """`skinny_gemm` by a plan."""
    problem = plan.problem
    x = (operands.x if problem.wide else operands.narrow)[: problem.tokens]
    x_scale = None if problem.wide else operands.x_scale[: problem.tokens]
    out = torch.empty(problem.tokens, problem.rows, dtype=torch.bfloat16, device="cuda")
    rest: dict[str, Any] = {"out": out, "plan": plan, "workspace": Workspace(plan, x.device), "early": early}
    return lambda copy: skinny_gemm(x, operands.w[copy], operands.w_scale, x_scale, **rest)


def compile_all(operands: Operands, plans: Iterable[tuple[Plan, bool]]) -> None:
    """Compile the kernels of plans, each with whether it is to begin early, several at once."""
    kernels = {(plan.tiling, plan.cut.residents, early): our_way(operands, plan, early) for plan, early in plans}
    with ThreadPoolExecutor(
        COMPILERS, initializer=torch.cuda.synchronize
    ) as pool:  # a thread needs a context for its tensor maps
        list(pool.map(lambda way: way(0), kernels.values()))
    torch.cuda.synchronize()


def check(operands: Operands, plan: Plan, early: bool) -> None:
    """Raise RuntimeError unless the first rows of the product are what fp64 makes of them."""
    problem = plan.problem
    x = (operands.x if problem.wide else operands.narrow)[: problem.tokens]
    x_scale = None if problem.wide else operands.x_scale[: problem.tokens]
    found = skinny_gemm(x, operands.w[0], operands.w_scale, x_scale, plan=plan, early=early)[:, :SAMPLE].double()
    wanted = skinny_gemm_ref(x, operands.w[0, :SAMPLE], operands.w_scale[:SAMPLE].contiguous(), x_scale).double()
    error = (found - wanted).abs().max() / wanted.abs().max()
    if not error < 0.01:
        raise RuntimeError(f"{plan}: the product is wrong by {error:.1%} of its greatest element")


def library_ways(operands: Operands, tokens: int, halves: torch.Tensor) -> dict[str, Way]:
    """cuBLAS by `torch._scaled_mm` with one scale a tensor and one a row, and in bf16 with the weights `halves`."""
    x, narrow = operands.x[:tokens], operands.narrow[:tokens]
    one = torch.full((), 0.02, device="cuda")
    rows = (operands.x_scale[:tokens, None], operands.w_scale[None, :])
    out = torch.empty(tokens, operands.shape[0], dtype=torch.bfloat16, device="cuda")
    scaled: Callable[..., Any] = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    return {
        "cublas_fp8": lambda copy: scaled(narrow, operands.w[copy].T, scale_a=one, scale_b=one),
        "cublas_fp8_rows": lambda copy: scaled(narrow, operands.w[copy].T, scale_a=rows[0], scale_b=rows[1]),
        "cublas_bf16": lambda copy: torch.mm(x, halves[copy].T, out=out),
    }


def measure_library(operands: Operands, tokens: int, halves: torch.Tensor, repeats: int) -> dict[str, Spread]:
    """Microseconds of cuBLAS: where it takes no product of so few tokens, of 16; a way it does not take at all is left out."""
    found = {}
    for name in library_ways(operands, tokens, halves):
        for padded in sorted({tokens, max(16, tokens)}):
            way = library_ways(operands, padded, halves)[name]
            try:
                found[name] = microseconds(way, len(operands.w if "fp8" in name else halves), repeats)
                break
            except (RuntimeError, ValueError) as error:
                print(f"{name} takes no {padded} tokens: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def measure_plain(operands: Operands, tokens: int, repeats: int) -> tuple[str, Spread]:
    """Microseconds of the fastest plain Triton product, and which that is."""
    rows, columns = operands.shape
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
    rest = (out, operands.x_scale[:tokens], operands.w_scale)
    found = [
        (name, microseconds(lambda copy: launch(operands.narrow[:tokens], operands.w[copy], *rest), len(operands.w), repeats))  # noqa: B023
        for name, launch in plain_launches(tokens, rows, columns)
    ]
    return min(found, key=lambda each: each[1].median)
