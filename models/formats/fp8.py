"""FP8, e4m3 without infinities (Micikevicius et al., arXiv:2209.05433), with one fp32 scale a row.

A word holds four weights k0 to k3 of a row, its bits spread so that few operations make bf16 of them: e4m3's exponent and
mantissa become the low end of bf16's exponent and the high end of its mantissa, which is the weight times 2^-120, subnormal
numbers included.  In each half of the word, k0 (low half) and k1 (high half) are in place: the sign in bit 15, the others in
bits 4 to 10.  k2 and k3 take what is left: the sign bit 11, the upper three bits 12 to 14, the lower four bits 0 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.formats.base import PAGE_ROWS, Codes, Packed

LARGEST = 448.0
# What a row's largest weight may become of `LARGEST`, all tried: a scale within one octave moves the steps of every weight, one
# below 1 also clips the largest.
SHARES = (1.0, 0.84, 0.71, 0.59)
NOT_A_NUMBER = 0x7F  # but for its sign
IN_PLACE = -0x78100000  # sign, exponent and mantissa of a code that begins at bit 20 of fp32: 0x87F00000


@dataclass(frozen=True)
class Fp8(Packed):
    """See above.  The scale is the same for all pages of a row; `group` is a page's columns."""

    def quantise(self, rows: torch.Tensor) -> Codes:
        most = rows.abs().amax(1, keepdim=True)
        best = torch.zeros_like(most)
        least = torch.full_like(most, torch.inf)
        room = torch.empty_like(rows)  # new memory for each result would take most of the time
        for share in SHARES:
            scale = torch.where(most > 0, most * (share / LARGEST), 1.0)
            error = numbers(rounded(rows, scale, room)).mul_(scale).sub_(rows).square_().sum(1, keepdim=True)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        values = rounded(rows, best, room).view(torch.uint8)
        return Codes(values, best.expand(-1, rows.shape[1] // self.group).contiguous())

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        codes = values.view(len(values), -1, 4).to(torch.int16)
        return half(codes[..., :2], codes[..., 2:]).view(torch.int32)[..., 0]  # the low half first

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        low, high = words & 0xFFFF, words >> 16 & 0xFFFF
        codes = [first(low), first(high), second(low), second(high)]
        return torch.stack(codes, 2).flatten(1).to(torch.uint8)

    def encode_scales(self, codes: Codes) -> torch.Tensor:
        return codes.scales.view(torch.int32)[..., None]

    def decode_scales(self, values: torch.Tensor, words: torch.Tensor) -> Codes:
        return Codes(values, words[..., 0].contiguous().view(torch.float32))

    def widen(self, codes: Codes) -> torch.Tensor:
        numbers = codes.values.view(torch.float8_e4m3fn).float().view(*codes.scales.shape, -1)
        return (numbers * codes.scales[..., None]).flatten(1)


def rounded(rows: torch.Tensor, scale: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Rows divided by their scales, to the nearest number of the format; `room` is for what comes between."""
    return torch.div(rows, scale, out=room).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """Codes of finite numbers as fp32, as PyTorch has them in five times as long: their bits in fp32's places are 2^-120 of
    them."""
    bits = codes.view(torch.int8).to(torch.int32)
    return bits.bitwise_left_shift_(20).bitwise_and_(IN_PLACE).view(torch.float32).mul_(2.0**120)


def half(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two codes in the 16 bits of half a word."""
    in_place = (first & 0x80) << 8 | (first & 0x7F) << 4
    return in_place | (second & 0x80) << 4 | (second & 0x70) << 8 | second & 0xF


def first(bits: torch.Tensor) -> torch.Tensor:
    """The code in place, of half a word's bits."""
    return bits >> 8 & 0x80 | bits >> 4 & 0x7F


def second(bits: torch.Tensor) -> torch.Tensor:
    """The other."""
    return bits >> 4 & 0x80 | bits >> 8 & 0x70 | bits & 0xF


FP8 = Fp8("fp8", columns=1024, scale_words=PAGE_ROWS, group=1024)
