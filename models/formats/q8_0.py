"""GGUF's Q8_0: integers of 8 bits in groups of 32 columns of a row, each with a scale in fp16: weight = (code - 128) * scale.

A word holds four consecutive weights k0 to k3 of a row, in the order k0, k2, k1, k3 from its low byte on: so a byte of either
half, alone in that half, is a number in bf16, subnormal ones included, which is the code times 2^-133.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.formats.base import PAGE_ROWS, Codes
from models.formats.blocks import GROUP, Blocks, steps_of

ZERO = 128
MOST = 127  # of either sign, where weights are quantised here; files may have -128
ORDER = [0, 2, 1, 3]  # its own inverse


@dataclass(frozen=True)
class Q8(Blocks):
    """See above."""

    def quantise(self, rows: torch.Tensor) -> Codes:
        groups = rows.view(len(rows), -1, GROUP)
        _, scale, steps = steps_of(groups, groups.abs().amax(2) / MOST, -MOST, MOST)
        return Codes((steps + ZERO).flatten(1).to(torch.uint8), scale)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(len(values), -1, 4)[..., ORDER].view(torch.int32)[..., 0]

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        return words.contiguous().view(torch.uint8).view(len(words), -1, 4)[..., ORDER].flatten(1)

    def widen(self, codes: Codes) -> torch.Tensor:
        steps = codes.values.view(*codes.scales.shape, -1).float() - ZERO
        return (steps * codes.scales[..., None]).flatten(1)


Q8_0 = Q8("q8_0", columns=1024, scale_words=1024 // GROUP * PAGE_ROWS // 2, group=GROUP, several=False)
