"""The grouped product in plain PyTorch, one group after another: what the kernel is compared with, and what a CPU does."""

from __future__ import annotations

import torch
from torch import Tensor

from megakernel.grouped.tiling import sizes

Scales = tuple[Tensor, Tensor]  # fp32 [rows] of x, and fp32 [groups, N] of w


def grouped_reference(x: Tensor, w: Tensor, offsets: Tensor, scales: Scales | None = None) -> Tensor:
    """fp32 [rows, N]: x [rows, K] times W[g]^T for the rows of each group g of w [groups, N, K]; rows beyond the last group 0.

    Group g has the rows [offsets[g - 1], offsets[g]).  Products of what x and w hold, summed in fp32, times the scales of the
    row of x and of the row of w; waits for the device.
    """
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float32, device=x.device)
    for group, (start, count) in enumerate(sizes(offsets.tolist(), x.shape[0])):
        if count:
            rows = y[start : start + count]
            torch.mm(x[start : start + count].float(), w[group].float().T, out=rows)
            if scales is not None:
                rows *= scales[0][start : start + count, None] * scales[1][group]
    return y
