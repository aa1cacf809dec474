"""The grouped product on the host: what is asked for is looked at, then one kernel is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megakernel.grouped.reference import Scales, grouped_reference
from megakernel.grouped.tiling import ALIGNMENT, MOST_GROUPS, SLOTS, TILE_ROWS, Plan, sizes
from models.errors import UserError

MOST = 2**31 - 1  # coordinates are int32
HOPPER = 9
BYTES = torch.float8_e4m3fn


def grouped_product(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    plan: Plan | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """y[rows of group g] = x[rows of group g] W[g]^T, for all groups in one kernel; bf16 [rows, N].

    x: bf16 [rows, K], sorted by group.  w: bf16 [groups, N, K].  offsets: int32 [groups], where each group ends: group g has
    the rows [offsets[g - 1], offsets[g]), any number of them, none too; as `torch._grouped_mm` takes them.  All on one device.
    out: where y is written, bf16 [rows, N]; rows beyond the last group stay as they are, and are undefined in a new y.
    scales: with x and w of e4m3 in place of bf16, what their rows are multiplied with, fp32 [rows] and fp32 [groups, N].

    N and K are multiples of 16, there are up to 1,024 groups.  On a GPU, which must be Hopper, the host does not wait: the
    kernel reads the offsets, on the current stream, and can be captured in a CUDA graph.  Offsets that fall, or lie outside x,
    give wrong rows but touch nothing outside y.  The same input gives the same bits; sums are fp32, rounded once, those of
    e4m3 as precise as Hopper's tensor cores sum it, about 14 bits.

    plan: SMs and the order of tiles; by default all SMs.  Raises UserError where the tensors are no such product.
    """
    check(x, w, offsets, out, plan, scales)
    rows, n = x.shape[0], w.shape[1]
    if out is None:
        out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)
    if rows == 0:
        return out
    if x.device.type == "cpu":
        y = grouped_reference(x, w, offsets, scales)
        for start, count in sizes(offsets.tolist(), rows):
            out[start : start + count] = y[start : start + count].to(out.dtype)
        return out
    with torch.cuda.device(x.device):
        launch(x, w, offsets, out, Plan(multiprocessors(x.device)) if plan is None else plan, scales)
    return out


def launch(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor, plan: Plan, scales: Scales | None) -> None:
    """Enqueue the kernel for tensors that have been checked."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from megakernel.device.grouped.product import BOX, SMALL_BOX, grouped_kernel
    from megakernel.options import BYTES_LAYOUT, OPTIONS, TMA_LAYOUT, WARPS, Sizes

    groups, n, k = w.shape
    tiling = plan.tiling(groups, x.element_size())

    def boxes(matrix: Tensor, height: int) -> Any:
        return TensorDescriptor.from_tensor(matrix, [height, tiling.step], BYTES_LAYOUT if tiling.scaled else TMA_LAYOUT)

    operands = (boxes(x, BOX.value), boxes(x, SMALL_BOX.value), boxes(w.view(groups * n, k), TILE_ROWS))
    x_scale, w_scale = (out, out) if scales is None else scales  # not looked at where there are none
    numbers = (groups, x.shape[0], n, k, plan.band)
    arguments = (*operands, x_scale, w_scale, offsets, out, *numbers, Sizes(tiling))
    grouped_kernel[(plan.sms,)](*arguments, num_warps=WARPS, **OPTIONS)


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def check(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None, plan: Plan | None, scales: Scales | None) -> None:
    """Raises UserError, in one line, for what is no grouped product or cannot be multiplied here."""
    for name, tensor, dims in (("x", x, 2), ("w", w, 3), ("offsets", offsets, 1)):
        if tensor.dim() != dims:
            raise UserError(f"{name} has the shape {shown(tensor)}: give x [rows, K], w [groups, N, K], offsets [groups]")
    dtype = x.dtype if x.dtype == BYTES else torch.bfloat16
    if (dtype == BYTES) != (scales is not None):
        raise UserError(f"x is {x.dtype} and there are {'no ' if scales is None else ''}scales: give them with {BYTES} alone")
    wanted = {"x": (x, dtype), "w": (w, dtype), "offsets": (offsets, torch.int32)}
    if out is not None:
        wanted["out"] = (out, torch.bfloat16)
    if scales is not None:
        wanted |= {"the scale of x": (scales[0], torch.float32), "the scale of w": (scales[1], torch.float32)}
    for name, (tensor, needed) in wanted.items():
        if tensor.dtype != needed:
            raise UserError(f"{name} is {tensor.dtype}: give it as {needed}")
        if tensor.device != x.device:
            raise UserError(f"{name} is on {tensor.device} and x on {x.device}: give all on one device")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise UserError(f"{name} is not contiguous from a multiple of 16 bytes on: give it as a tensor of its own")
    check_sizes(x, w, offsets, out, scales)
    if plan is not None and (plan.band < 1 or plan.sms < 1 or not 2 <= plan.slots <= SLOTS):
        raise UserError(f"{plan} cannot be launched: use at least 1 SM, a band of at least 1, and 2 to {SLOTS} slots")
    if x.device.type != "cpu":
        check_device(x.device)


def check_sizes(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None, scales: Scales | None) -> None:
    """Raises UserError where sizes do not meet, or the kernel does not take them."""
    rows, (groups, n, k) = x.shape[0], w.shape
    if x.shape[1] != k:
        raise UserError(f"x {shown(x)} has {x.shape[1]} columns and w {shown(w)} has {k}: both are K")
    if len(offsets) != groups:
        raise UserError(f"there are {len(offsets)} offsets for {groups} groups: give where each group ends, one a group")
    if not 1 <= groups <= MOST_GROUPS:
        raise UserError(f"w has {groups} groups: use 1 to {MOST_GROUPS}")
    for name, size in (("N", n), ("K", k)):
        if size % ALIGNMENT or size == 0:
            raise UserError(f"w {shown(w)} has {name} = {size}: use a multiple of {ALIGNMENT}, padded with zeros")
    if max(rows, groups * n) > MOST:
        raise UserError(f"x {shown(x)} or w {shown(w)} has more than {MOST} rows: multiply it in parts")
    if out is not None and out.shape != (rows, n):
        raise UserError(f"out has the shape {shown(out)}: give [{rows}, {n}]")
    if scales is not None and (scales[0].shape != (rows,) or scales[1].shape != (groups, n)):
        raise UserError(
            f"scales have the shapes {', '.join(map(shown, scales))}: give [{rows}], one a row of x, and [{groups}, {n}]"
        )


def check_device(device: torch.device) -> None:
    """Raises UserError unless it is a Hopper GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"the tensors are on {device}: the grouped product needs a Hopper GPU, or a CPU")
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        raise UserError(f"{torch.cuda.get_device_name(device)} is no Hopper GPU: the grouped product needs one, or a CPU")


def shown(tensor: Tensor) -> str:
    """A shape for people to read."""
    return str(list(tensor.shape))
