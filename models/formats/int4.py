"""Integers of 4 bits in groups of 128 columns of a row, each with a scale and a zero point: weight = (code - zero) * scale.

Groups of 128, because that is what most checkpoints in 4 bits have, so that they are taken as they are, and because a tile of
the matrix instruction's accumulators is then a group: its sum is scaled once, in fp32.  Groups of 64 would read 6 % more.

Words are those of `models.formats.nibbles`.  Beside a page lies a word for each of its 16 groups and 16 rows: the scale in
fp32, in the last four bits of its mantissa the zero point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.formats import nibbles
from models.formats.base import PAGE_ROWS, Codes, Packed
from models.formats.tries import Try, best

ZERO_BITS = nibbles.MOST
SHARES = (1.0, 0.94, 0.88, 0.81, 0.74)  # of a group's range that its codes may span, all tried


@dataclass(frozen=True)
class Int4(Packed):
    """See above."""

    def quantise(self, rows: torch.Tensor) -> Codes:
        groups = rows.view(len(rows), -1, self.group)
        first, zero, scale = best(tries(groups))
        values = codes_of(groups, first, zero, torch.empty_like(groups)).flatten(1).to(torch.uint8)
        return Codes(values, scale, zero.to(torch.uint8))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return nibbles.words_of(values)

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        return nibbles.codes_of(words)

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


def tries(groups: torch.Tensor) -> Iterator[Try]:
    """Errors, the scales that codes are made with, zero points, and the scales that suit the codes best, for each share."""
    low, high = groups.aminmax(dim=2)
    low, high = low.clamp(max=0), high.clamp(min=0)  # 0 has a code
    steps, room = torch.empty_like(groups), torch.empty_like(groups)  # new memory for each result would take most of the time
    for share in SHARES:
        first = shortened(torch.where(high > low, (high - low) * (share / ZERO_BITS), 1.0))
        zero = (-low * share / first).round().clamp(0, ZERO_BITS)
        codes_of(groups, first, zero, steps).sub_(zero[..., None])
        weight = torch.mul(steps, steps, out=room).sum(2)  # by least squares
        product = torch.mul(steps, groups, out=room).sum(2)
        scale = shortened(torch.where(product > 0, product / weight, first))
        error = torch.mul(steps, scale[..., None], out=room).sub_(groups).square_().sum(2)
        yield error, first, zero, scale


def codes_of(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The codes nearest to groups of numbers, fp32, in `out`."""
    return torch.div(groups, scale[..., None], out=out).round_().add_(zero[..., None]).clamp_(0, ZERO_BITS)


def shortened(scales: torch.Tensor) -> torch.Tensor:
    """fp32 scales without the last four bits of their mantissas."""
    return (scales.contiguous().view(torch.int32) & ~ZERO_BITS).view(torch.float32)


INT4 = Int4("int4", columns=2048, scale_words=16 * PAGE_ROWS, summed=128, group=128)
