"""GGUF's Q4_1: integers of 4 bits in groups of 32 columns of a row, each with a scale and an offset in fp16:
weight = code * scale + offset.

Words are those of `models.formats.nibbles`; beside a page lies a word for each group and row, the scale in its low half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.formats import nibbles
from models.formats.base import PAGE_ROWS, Codes
from models.formats.blocks import GROUP, Blocks, rounded
from models.formats.tries import Try, best

SHARES = (1.0, 0.94, 0.88, 0.81)  # of a group's range that its codes may span, all tried


@dataclass(frozen=True)
class Q4Offset(Blocks):
    """See above."""

    def quantise(self, rows: torch.Tensor) -> Codes:
        scale, offset, steps = best(tries(rows.view(len(rows), -1, GROUP)))
        return Codes(steps.flatten(1).to(torch.uint8), scale, offsets=offset)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return nibbles.words_of(values)

    def decode(self, words: torch.Tensor) -> torch.Tensor:
        return nibbles.codes_of(words)

    def encode_scales(self, codes: Codes) -> torch.Tensor:
        assert codes.offsets is not None
        halves = torch.stack([codes.scales, codes.offsets], 2).to(torch.float16)
        return halves.view(torch.int32).view(len(halves), -1, self.scale_words // PAGE_ROWS)

    def decode_scales(self, values: torch.Tensor, words: torch.Tensor) -> Codes:
        scales, offsets = words.flatten(1).view(torch.float16).float().unflatten(1, (-1, 2)).unbind(2)
        return Codes(values, scales.contiguous(), offsets=offsets.contiguous())

    def widen(self, codes: Codes) -> torch.Tensor:
        assert codes.offsets is not None
        steps = codes.values.view(*codes.scales.shape, -1).float()
        return (steps * codes.scales[..., None] + codes.offsets[..., None]).flatten(1)


def tries(groups: torch.Tensor) -> Iterator[Try]:
    """Errors, scales, offsets and codes for each share; scale and offset suit the codes best, by least squares."""
    low, high = groups.aminmax(dim=2)
    mean = groups.mean(2)
    for share in SHARES:
        width = (high - low) * (share / nibbles.MOST)
        base = low + (high - low) * ((1 - share) / 2)
        steps = (groups - base[..., None]) / torch.where(width > 0, width, 1.0)[..., None]
        steps = steps.round_().clamp_(0, nibbles.MOST)
        centre = steps.mean(2)
        apart = steps - centre[..., None]
        weight = apart.square().sum(2)
        scale = rounded(torch.where(weight > 0, (apart * groups).sum(2) / weight, 0.0))
        offset = rounded(mean - scale * centre)
        error = (groups - steps * scale[..., None] - offset[..., None]).square_().sum(2)
        yield error, scale, offset, steps


Q4_1 = Q4Offset("q4_1", columns=2048, scale_words=2048 // GROUP * PAGE_ROWS, summed=GROUP, group=GROUP, several=False)
