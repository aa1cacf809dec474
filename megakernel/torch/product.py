"""How a matrix is multiplied on each kind of device: bf16 weights, sums in fp32 where the device can give them.

Everywhere the input is rounded to the weights' type once.  PyTorch's own bf16 product on a CPU rounds its result too and, without
bf16 instructions, is many times slower than fp32 for more than one token; so there weights are widened, a piece at a time that
stays in the cache.  Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from megakernel.torch.weights import Linear

WIDENED = 2**20  # weights at a time

Multiply = Callable[[Tensor, Tensor], Tensor]


class Product:
    """x W^T + b for the matrices of one model."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.multiply: Multiply = multiplication(dtype, device)

    def __call__(self, matrix: Linear, x: Tensor) -> Tensor:
        """fp32 [tokens, rows] from x, fp32 [tokens, K]."""
        product = self.multiply(matrix.weight, x.to(self.dtype))
        return product if matrix.bias is None else product.add_(matrix.bias)


def multiplication(dtype: torch.dtype, device: torch.device) -> Multiply:
    """The best that the device can do: fp32 [tokens, rows] from W [rows, K] and x [tokens, K], both of `dtype`."""
    if dtype == torch.float32:
        return lambda weight, x: linear(x, weight)
    if device.type == "cpu":
        return Widening()
    if gives_fp32(dtype, device):
        return lambda weight, x: torch.mm(x, weight.T, out_dtype=torch.float32)
    return lambda weight, x: linear(x, weight).float()


def gives_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of `dtype` without rounding the result to it: CUDA does, others may."""
    sample = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(sample, sample, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


class Widening:
    """Multiplies in fp32 by weights that are widened a piece at a time, into the same memory."""

    def __init__(self) -> None:
        self.room = torch.empty(0)

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        rows, columns = weight.shape
        step = max(1, WIDENED // columns)
        if self.room.numel() < min(step, rows) * columns:
            self.room = torch.empty(step * columns)
        x = x.float()
        product = x.new_empty(len(x), rows)
        for start in range(0, rows, step):
            piece = weight[start : start + step]
            wide = self.room[: piece.numel()].view(piece.shape)
            wide.copy_(piece)
            part = product[:, start : start + step]  # [tokens, step]
            if len(x) == 1:
                torch.mv(wide, x[0], out=part[0])
            else:
                torch.mm(x, wide.T, out=part)
        return product
