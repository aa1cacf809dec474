"""GGUF's Q4_0: integers of 4 bits in groups of 32 columns of a row, each with a scale in fp16: weight = (code - 8) * scale.

Words are those of `models.formats.nibbles`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.formats import nibbles
from models.formats.base import PAGE_ROWS, Codes
from models.formats.blocks import GROUP, Blocks, steps_of
from models.formats.tries import best

ZERO = 8
SHARES = (1.0, 0.94, 0.88, 0.81)  # of what the weight of the largest size becomes of -8, all tried


@dataclass(frozen=True)
class Q4(Blocks):
    """See above."""

    def quantise(self, rows: torch.Tensor) -> Codes:
        groups = rows.view(len(rows), -1, GROUP)
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
        scale, steps = best(steps_of(groups, largest * share / -ZERO, -ZERO, ZERO - 1) for share in SHARES)
        return Codes((steps + ZERO).flatten(1).to(torch.uint8), scale)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return nibbles.words_of(values)

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        return nibbles.codes_of(words)

    def widen(self, codes: Codes) -> torch.Tensor:
        steps = codes.values.view(*codes.scales.shape, -1).float() - ZERO
        return (steps * codes.scales[..., None]).flatten(1)


Q4_0 = Q4("q4_0", columns=2048, scale_words=2048 // GROUP * PAGE_ROWS // 2, summed=GROUP, group=GROUP, several=False)
