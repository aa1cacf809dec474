"""GGUF's blocks that a format of `models.formats` holds as they are: which these are, and their codes.

Layout: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, blocks of 32 columns: the scale in fp16, Q4_1's offset
likewise, and the codes, those of 4 bits with columns 0 to 15 in the lower halves of bytes.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from models.errors import UserError
from models.formats import FORMATS, Packed
from models.formats.base import Codes
from models.formats.blocks import GROUP, LARGEST
from models.formats.q4_0 import ZERO

SIGN = 0x80  # what makes code + 128 of a byte with a sign
HALF = np.dtype("<f2")


def format_for(kinds: Collection[str]) -> Packed | None:
    """The format that holds blocks of all these types; None where there is none."""
    names = {"Q8_0": ("Q8_0",), "Q4_0": ("Q4_0",), "Q4_1": ("Q4_0", "Q4_1")}
    for name, held in names.items():
        if kinds and set(kinds) <= set(held):
            format = FORMATS[name.lower()]
            assert isinstance(format, Packed)
            return format
    return None


def codes_of(raw: np.ndarray, kind: str, format: Packed) -> Codes:
    """The codes, in a format that holds them, of rows in blocks of one type: uint8 [rows, blocks, bytes of a block].

    Raises `UserError` for a scale that the format does not hold.
    """
    scales, rest = _halves(raw, 0), raw[:, :, HALF.itemsize :]
    if kind == "Q8_0":
        return Codes(torch.from_numpy(rest ^ SIGN).flatten(1), scales)
    offsets = None
    if kind == "Q4_1":
        offsets, rest = _halves(raw, HALF.itemsize), rest[:, :, HALF.itemsize :]
    elif format.name == "q4_1":
        offsets = scales * -ZERO
        if bool((offsets.isfinite() & (offsets.abs() > LARGEST)).any()):
            raise UserError("has scales too large for Q4_1, which others of its matrices are in: say --weights bf16")
    values = np.concatenate([rest & 0xF, rest >> 4], axis=2).reshape(len(raw), -1)
    return Codes(torch.from_numpy(values), scales, offsets=offsets)


def _halves(raw: np.ndarray, start: int) -> torch.Tensor:
    """The numbers in fp16 at a place of every block, in fp32: [rows, blocks]."""
    halves = np.ascontiguousarray(raw[:, :, start : start + HALF.itemsize]).view(HALF)[:, :, 0]
    return torch.from_numpy(halves.astype(np.float32))


def empty(rows: int, columns: int, format: Packed) -> Codes:
    """Room for the codes of a matrix."""
    scales = torch.empty(rows, columns // GROUP)
    offsets = torch.empty_like(scales) if format.name == "q4_1" else None
    return Codes(torch.empty(rows, columns, dtype=torch.uint8), scales, offsets=offsets)
