"""What the formats share that have groups of 32 columns of a row and numbers in fp16 for each, as GGUF's blocks have
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h: block_q8_0, block_q4_0, block_q4_1).

A group is too short to have accumulators of its own: of the 8 columns of the matrix instruction each sums another group.
Tiles have 128 columns, so four groups; the groups of a tile and of the fourth one after it share a tile of accumulators.  The
words beside a page lie in the order in which the lanes of a warp hold those accumulators: 2 rows of 2 groups each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from models.formats.base import PAGE_ROWS, Codes, Packed

GROUP = 32
TILE_GROUPS = 4
LARGEST = 65504.0  # of fp16


@dataclass(frozen=True)
class Blocks(Packed):
    """A format with a scale a group.  A word holds those of two groups of a row, the first in its low half."""

    @property
    def scale_places(self) -> torch.Tensor:
        return places(self.columns // self.group, self.scale_words)

    def encode_scales(self, codes: Codes) -> torch.Tensor:
        halves = codes.scales.to(torch.float16)
        return halves.view(torch.int32).view(len(halves), -1, self.scale_words // PAGE_ROWS)

    def decode_scales(self, values: torch.Tensor, words: torch.Tensor) -> Codes:
        return Codes(values, words.flatten(1).view(torch.float16).float())


@cache
def places(groups: int, words: int) -> torch.Tensor:
    """Where the words of a row lie, of which the first are those of the first group: int64 [16 rows, words / 16]."""
    each = words // (groups * PAGE_ROWS // 2)  # words of two groups
    first = torch.arange(0, groups, 2)
    tile = first // TILE_GROUPS
    accumulators, column = tile // 8 * 4 + tile % 4, tile // 4 % 2 * TILE_GROUPS + first % TILE_GROUPS
    row = torch.arange(PAGE_ROWS)[:, None]
    lane = row % 8 * 4 + column // 2
    place = (accumulators * 32 + lane) * 2 + row // 8
    return (place[..., None] * each + torch.arange(each)).flatten(1)


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    """To the nearest that fp16 holds, in fp32."""
    return numbers.clamp(-LARGEST, LARGEST).to(torch.float16).float()


def steps_of(groups: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> tuple[torch.Tensor, ...]:
    """Groups [rows, groups, 32] as multiples of scales [rows, groups] from `least` to `most`: the squared error, the scale that
    suits these best, by least squares, in fp16, and the multiples."""
    scale = rounded(scale)
    steps = (groups / torch.where(scale != 0, scale, 1.0)[..., None]).round_().clamp_(least, most)
    weight = steps.square().sum(2)
    scale = rounded(torch.where(weight > 0, (steps * groups).sum(2) / weight, scale))
    return (groups - steps * scale[..., None]).square_().sum(2), scale, steps
