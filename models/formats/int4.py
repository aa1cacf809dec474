"""Integers of 4 bits in groups of 128 columns of a row, each with a scale and a zero point: weight = (code - zero) * scale.

Groups of 128, because that is what most checkpoints in 4 bits have, so that they are taken as they are, and because a tile of
the matrix instruction's accumulators is then a group: its sum is scaled once, in fp32.  Groups of 64 would read 6 % more.

A word holds eight consecutive weights k0 to k7 of a row, the even ones in its low half and the odd ones in its high half, in
four bits each, all of it turned left by 3.  So each pair stands where bf16 has the upper bits of its mantissa, after a shift
alone: 0x4180 and a code there is 16 + code.  Beside a page lies a word for each of its 16 groups and 16 rows: the scale in
fp32, in the last four bits of its mantissa the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.formats.base import PAGE_ROWS, Codes, Packed

CODES = 16
ZERO_BITS = CODES - 1
SHARES = (1.0, 0.94, 0.88, 0.81, 0.74)  # of a group's range that its codes may span, all tried


@dataclass(frozen=True)
class Int4(Packed):
    """See above."""

    def quantise(self, rows: torch.Tensor) -> Codes:
        groups = rows.view(len(rows), -1, self.group)
        low, high = groups.aminmax(dim=2)
        low, high = low.clamp(max=0), high.clamp(min=0)  # 0 has a code
        best: tuple[torch.Tensor, ...] = ()
        for share in SHARES:
            scale = shortened(torch.where(high > low, (high - low) * (share / ZERO_BITS), 1.0))
            zero = (-low * share / scale).round().clamp(0, ZERO_BITS)
            steps = ((groups / scale[..., None]).round_() + zero[..., None]).clamp_(0, ZERO_BITS).sub_(zero[..., None])
            weight = steps.square().sum(2)  # the scale that suits these codes best, by least squares
            product = (steps * groups).sum(2)
            scale = shortened(torch.where(product > 0, product / weight, scale))
            error = (groups - steps * scale[..., None]).square_().sum(2)
            found = (error, scale, zero, steps)
            best = found if not best else tuple(better(error < best[0], new, old) for new, old in zip(found, best, strict=True))
        _, scale, zero, steps = best
        values = (steps + zero[..., None]).flatten(1).to(torch.uint8)
        return Codes(values, scale, zero.to(torch.uint8))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        pairs = values.view(len(values), -1, 4, 2).to(torch.int16)
        halves = pairs[:, :, 0] | pairs[:, :, 1] << 4 | pairs[:, :, 2] << 8 | pairs[:, :, 3] << 12
        plain = halves.view(torch.int32)[..., 0]  # the low half first
        return plain << 3 | plain >> 29 & 7

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        plain = words >> 3 & 0x1FFFFFFF | words << 29
        codes = [plain >> 4 * (place // 2) + 16 * (place % 2) & ZERO_BITS for place in range(8)]
        return torch.stack(codes, 2).flatten(1).to(torch.uint8)

    def encode_scales(self, codes: Codes) -> torch.Tensor:
        assert codes.zeros is not None
        words = codes.scales.view(torch.int32) | codes.zeros.to(torch.int32)
        return words.view(len(words), -1, self.scale_words // PAGE_ROWS)

    def decode_scales(self, values: torch.Tensor, words: torch.Tensor) -> Codes:
        words = words.flatten(1)
        return Codes(values, (words & ~ZERO_BITS).view(torch.float32), (words & ZERO_BITS).to(torch.uint8))

    def widen(self, codes: Codes) -> torch.Tensor:
        assert codes.zeros is not None
        steps = codes.values.view(*codes.scales.shape, -1).float() - codes.zeros[..., None].float()
        return (steps * codes.scales[..., None]).flatten(1)


def shortened(scales: torch.Tensor) -> torch.Tensor:
    """fp32 scales without the last four bits of their mantissas."""
    return (scales.contiguous().view(torch.int32) & ~ZERO_BITS).view(torch.float32)


def better(where: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` in the groups that are meant, [rows, groups] or [rows, groups, columns]."""
    return torch.where(where if new.ndim == where.ndim else where[..., None], new, old)


INT4 = Int4("int4", columns=2048, scale_words=16 * PAGE_ROWS, summed=128, group=128)
