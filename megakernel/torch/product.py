"""How a matrix is multiplied on each kind of device: bf16 weights, fp32 sums, and fp32 results where they cost little.

Everywhere the input is rounded to the weights' type once.  On a CPU PyTorch's bf16 product is the quickest for one token but
rounds its result too, and for more tokens, without bf16 instructions, it is many times slower than fp32: there weights are
widened, a piece at a time that stays in the cache.  Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from megakernel.torch.weights import Linear

WIDENED = 2**20  # weights at a time

Multiply = Callable[[Tensor, Tensor, bool], Tensor]


class Product:
    """x W^T + b for the matrices of one model.  `exact` asks for a result that is not rounded to the weights' type, even
    where that takes longer."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.multiply: Multiply = multiplication(dtype, device)

    def __call__(self, matrix: Linear, x: Tensor, exact: bool = False) -> Tensor:
        """fp32 [tokens, rows] from x, fp32 [tokens, K]."""
        product = self.multiply(matrix.weight, x.to(self.dtype), exact)
        return product if matrix.bias is None else product.add_(matrix.bias)


def multiplication(dtype: torch.dtype, device: torch.device) -> Multiply:
    """The best that the device can do: fp32 [tokens, rows] from W [rows, K] and x [tokens, K], both of `dtype`."""
    if dtype == torch.float32:
        return lambda weight, x, exact: linear(x, weight)
    if device.type == "cpu":
        return Widening()
    if gives_fp32(dtype, device):
        return lambda weight, x, exact: torch.mm(x, weight.T, out_dtype=torch.float32)
    return lambda weight, x, exact: linear(x, weight).float()


def gives_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of `dtype` without rounding the result to it: CUDA does, others may."""
    sample = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(sample, sample, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


class Widening:
    """Multiplies on a CPU in fp32, by weights that are widened a piece at a time into the same memory; one token as PyTorch
    does."""

    def __init__(self) -> None:
        self.room = torch.empty(0)

    def __call__(self, weight: Tensor, x: Tensor, exact: bool) -> Tensor:
        if len(x) == 1 and not exact:
            return torch.mv(weight, x[0]).float()[None]
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
