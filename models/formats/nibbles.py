"""Codes of 4 bits as words: eight consecutive weights k0 to k7 of a row, the even ones in a word's low half and the odd ones in
its high half, in four bits each, all of it turned left by 3.

So each pair stands where bf16 has the upper bits of its mantissa, after a shift alone: 0x4180 and a code there is 16 + code.
"""

from __future__ import annotations

import torch

CODES = 16
MOST = CODES - 1


def words_of(values: torch.Tensor) -> torch.Tensor:
    """Codes, uint8 [n, K], as int32 [n, K / 8]."""
    pairs = values.view(len(values), -1, 4, 2).to(torch.int16)
    halves = pairs[:, :, 0] | pairs[:, :, 1] << 4 | pairs[:, :, 2] << 8 | pairs[:, :, 3] << 12
    plain = halves.view(torch.int32)[..., 0]  # the low half first
    return plain << 3 | plain >> 29 & 7


def codes_of(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `words_of`."""
    plain = words >> 3 & 0x1FFFFFFF | words << 29
    codes = [plain >> 4 * (place // 2) + 16 * (place % 2) & MOST for place in range(8)]
    return torch.stack(codes, 2).flatten(1).to(torch.uint8)
