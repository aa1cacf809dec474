"""A product of few tokens with an FP8 matrix, as fast as the matrix can be read.

The problem is that of decoding a small batch with FP8 weights, as "Accelerating Llama3 FP8 Inference with Triton Kernels"
(PyTorch blog, 2024) states it: a matrix is read once for 1 to 64 tokens, and a grid of output tiles alone keeps too few
multiprocessors busy.  Its TK-GEMM splits K among thread blocks that add to the result with atomics.  Here the split is even,
to a step, and the parts are added in the order of K.  docs/gemm.md says how.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megakernel.device.gemm.kernel import skinny_product
from megakernel.gemm.layouts import launch_options, operand_layout
from megakernel.gemm.operands import find_problem
from megakernel.gemm.plan import BOX, CONSUMER_ROWS, Plan, choose_plan
from megakernel.options import Sizes
from models.errors import UserError


class Workspace:
    """Memory in which thread blocks leave their parts of a split tile, for plans of up to this plan's size.

    It serves one launch at a time: launches that share one must not overlap, as those of one stream do not.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.parts = torch.empty(plan.parts, device=device)
        self.arrivals = torch.zeros(plan.arrivals, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # launches on any stream find the zeros

    def holds(self, plan: Plan) -> bool:
        """Whether a plan's launch finds room."""
        return plan.parts <= self.parts.numel() and plan.arrivals <= self.arrivals.numel()


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def skinny_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    plan: Plan | None = None,
    workspace: Workspace | None = None,
    early: bool = False,
) -> torch.Tensor:
    """y[m, n] = x_scale[m] w_scale[n] Σ_k x[m, k] w[n, k], bf16 [M, N], enqueued on the current stream.

    x: float8_e4m3fn [M, K] with x_scale, fp32 [M], or bfloat16 [M, K] without; M from 1 to 64, K a multiple of 16.
    w: float8_e4m3fn [N, K] with w_scale, fp32 [N].  Rows of x and w are contiguous and begin at multiples of 16 bytes, as far
    apart as they like.  out: where y goes, bf16 [M, N], contiguous.

    Sums are fp32; those of FP8 times FP8 are kept to about 14 bits by the tensor cores within a step of some hundred columns,
    and added in fp32 from step to step.  The same plan gives the same bits, by default one that depends on M, N, K, the type
    of x and the GPU's number of multiprocessors.  NaN and infinity spread as in any product, to the row and column they meet.

    workspace: by default one of the current stream; a captured graph needs its own.  early: the kernel may begin while the
    one before it on the stream ends, provided that one does not write w: all else is read once it has ended.

    Raises UserError, in one line, for shapes, types, strides and devices that do not fit; nothing is allocated then.
    """
    problem = find_problem(x, w, w_scale, x_scale, out)
    device = hopper(x.device)
    plan = choose_plan(problem, multiprocessors(device), early) if plan is None else plan
    if plan.problem != problem:
        raise UserError(f"the plan is for {plan.problem}, the operands are {problem}: make a plan for these")
    if workspace is None:
        workspace = stream_workspace(plan, device)
    elif not workspace.holds(plan) or workspace.parts.device != device:
        raise UserError("the workspace is too small for this plan, or elsewhere: make one of this plan on x's device")
    if out is None:
        out = torch.empty(problem.tokens, problem.rows, dtype=torch.bfloat16, device=device)
    arguments = (
        box(x, plan.tiling.tokens),
        box(w, plan.cut.consumers * CONSUMER_ROWS),
        out,
        w_scale if x_scale is None else x_scale,  # a product of bf16 tokens reads w_scale alone
        w_scale,
        workspace.parts,
        workspace.arrivals,
        *(problem.tokens, problem.rows, plan.steps, plan.least, plan.more),
        Sizes(plan.tiling),
    )
    with torch.cuda.device(device):
        skinny_product[(plan.cut.blocks,)](*arguments, **launch_options(plan), launch_pdl=early)
    return out


def box(operand: torch.Tensor, height: int) -> TensorDescriptor:
    """The tensor map of an operand by boxes of `height` rows."""
    rows, columns = operand.shape
    pitch = operand.stride(0) if rows > 1 else columns  # of a single row torch may say anything
    layout = operand_layout(operand.dtype == torch.bfloat16)
    return TensorDescriptor(operand, [rows, columns], [pitch, 1], [height, BOX], layout)


def stream_workspace(plan: Plan, device: torch.device) -> Workspace:
    """That of the current stream, made or enlarged where it must be."""
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    found = _workspaces.get(key)
    if found is None or not found.holds(plan):
        if torch.cuda.is_current_stream_capturing():
            raise UserError("a captured product needs a workspace of its own: pass workspace=Workspace(plan, device)")
        found = _workspaces[key] = Workspace(plan, device)
    return found


@cache
def hopper(device: torch.device) -> torch.device:
    """The device with its index; raises UserError where the kernel cannot run there."""
    if device.type != "cuda":
        raise UserError(f"the operands are on {device}: the kernel needs a Hopper GPU; skinny_gemm_ref runs anywhere")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise UserError(f"{device} has compute capability {capability[0]}.{capability[1]}: the kernel needs 9.0 (H100, H200)")
    return device


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
