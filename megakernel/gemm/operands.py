"""What is asked of the operands of a skinny product, on any device."""

from __future__ import annotations

import torch

from megakernel.gemm.plan import Problem
from models.errors import UserError

FP8 = torch.float8_e4m3fn
ALIGNMENT = 16  # bytes, of TMA


def find_problem(
    x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, x_scale: torch.Tensor | None, out: torch.Tensor | None
) -> Problem:
    """The problem that the operands of `skinny_gemm` are; raises UserError, which names the operand and the mend."""
    for name, operand in (("x", x), ("W", w)):
        if operand.dim() != 2:
            raise UserError(f"{name} has {operand.dim()} dimensions: it must have two, the last of them K")
    if w.dtype != FP8:
        raise UserError(f"W is {w.dtype}: it must be {FP8}")
    if x.dtype not in (FP8, torch.bfloat16):
        raise UserError(f"x is {x.dtype}: it must be {FP8} or torch.bfloat16")
    if x.shape[1] != w.shape[1]:
        raise UserError(f"x has {x.shape[1]} columns and W {w.shape[1]}: both must have K")
    wide = x.dtype == torch.bfloat16
    if wide != (x_scale is None):
        raise UserError("x in bf16 takes no x_scale: multiply y with it" if wide else "x in FP8 needs an x_scale, fp32 [M]")
    problem = Problem(x.shape[0], w.shape[0], x.shape[1], wide)
    check_scale("w_scale", w_scale, problem.rows)
    if x_scale is not None:
        check_scale("x_scale", x_scale, problem.tokens)
    check_lines("x", x)
    check_lines("W", w)
    if out is not None:
        check_out(out, problem)
    named = {"W": w, "w_scale": w_scale, "x_scale": x_scale, "out": out}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != x.device:
            raise UserError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
    return problem


def check_scale(name: str, scale: torch.Tensor, length: int) -> None:
    """One fp32 number a row."""
    if scale.dtype != torch.float32 or tuple(scale.shape) != (length,) or not scale.is_contiguous():
        raise UserError(f"{name} is {scale.dtype} {list(scale.shape)}: it must be torch.float32 [{length}], contiguous")


def check_lines(name: str, operand: torch.Tensor) -> None:
    """Rows as TMA reads them."""
    rows, columns = operand.shape
    pitch = operand.stride(0)
    apart = rows == 1 or (pitch >= columns and pitch * operand.itemsize % ALIGNMENT == 0)
    if operand.stride(1) != 1 or not apart:
        raise UserError(
            f"{name} has strides {operand.stride()}: rows must be contiguous, a multiple of {ALIGNMENT} bytes apart"
        )
    if operand.data_ptr() % ALIGNMENT:
        raise UserError(f"{name} does not begin at a multiple of {ALIGNMENT} bytes: clone it")


def check_out(out: torch.Tensor, problem: Problem) -> None:
    """Where y goes."""
    shape = (problem.tokens, problem.rows)
    if out.dtype != torch.bfloat16 or tuple(out.shape) != shape or not out.is_contiguous():
        raise UserError(f"out is {out.dtype} {list(out.shape)}: it must be torch.bfloat16 {list(shape)}, contiguous")
