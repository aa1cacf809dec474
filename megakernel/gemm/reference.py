"""What a skinny product is, in PyTorch alone, on any device."""

from __future__ import annotations

import torch

from megakernel.gemm.operands import find_problem


def skinny_gemm_ref(
    x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, x_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """`megakernel.gemm.gemm.skinny_gemm` in fp64, rounded once to bf16 [M, N].  Raises UserError as that does."""
    find_problem(x, w, w_scale, x_scale, None)
    y = x.double() @ w.double().T * w_scale.double()
    return (y if x_scale is None else y * x_scale.double()[:, None]).to(torch.bfloat16)
