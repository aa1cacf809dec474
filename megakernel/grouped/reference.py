"""The grouped product in plain PyTorch, one group after another: what the kernel is compared with, and what a CPU does."""

from __future__ import annotations

import torch
from torch import Tensor

from megakernel.grouped.tiling import sizes


def grouped_reference(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """fp32 [rows, N]: x [rows, K] times W[g]^T for the rows of each group g of w [groups, N, K]; rows beyond the last group 0.

    Group g has the rows [offsets[g - 1], offsets[g]).  Products of what x and w hold, summed in fp32; waits for the device.
    """
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float32, device=x.device)
    for matrix, (start, count) in zip(w, sizes(offsets.tolist(), x.shape[0]), strict=True):
        if count:
            torch.mm(x[start : start + count].float(), matrix.float().T, out=y[start : start + count])
    return y
