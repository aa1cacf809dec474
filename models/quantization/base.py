"""What the ways of quantising a checkpoint have in common: which tensors stand for a matrix, and the codes that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from models.errors import UserError, quoted
from models.formats import FORMATS, Packed
from models.formats.base import Codes
from models.formats.int4 import ZERO_BITS
from models.quantised import Quantised

CODES_A_WORD = 8  # of 4 bits in an int32
SCALES = ("BF16", "F16", "F32")


class Part(NamedTuple):
    """A tensor of a quantised matrix: the types, in safetensors' names, and the shapes that it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a checkpoint are quantised.  `method` is what its config.json calls it, `format` what they become."""

    method: str
    format: Packed

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """The tensors of a matrix [rows, columns], by the name that follows the module's; the first is there where the matrix
        is quantised, and nowhere else."""
        raise NotImplementedError

    def optional(self, rows: int, columns: int) -> dict[str, Part]:
        """Those that may be missing."""
        return {}

    def codes(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> Codes:
        """The codes that tensors make, of whole groups."""
        raise NotImplementedError

    def check_size(self, name: str, rows: int, columns: int) -> None:
        """Raise `UserError` for a matrix that cannot be had in this scheme."""

    def matrix(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> Quantised:
        """The matrix; raises `UserError` for values that stand for no numbers, or for some that the format does not hold."""
        codes = self.codes(parts, rows, columns)
        scales = codes.scales
        if not bool(torch.isfinite(scales).all()):
            raise UserError("a scale is no finite number: download the checkpoint anew")
        if codes.zeros is not None and bool((scales.view(torch.int32) & ZERO_BITS).any()):
            raise UserError("scales of more than 20 bits are not supported: save them in fp16 or bf16")
        return Quantised(self.format, codes, columns)


class Grouped(Scheme):
    """Four bits in groups: what holds of all of them."""

    def check_size(self, name: str, rows: int, columns: int) -> None:
        if columns % self.format.group or rows % CODES_A_WORD:
            raise UserError(
                f"{name}: {self.method} of a matrix [{rows}, {columns}] is not supported: "
                f"its rows must be whole groups of {self.format.group}, use another checkpoint"
            )


def nibbles(words: torch.Tensor, dimension: int, order: tuple[int, ...] = tuple(range(CODES_A_WORD))) -> torch.Tensor:
    """uint8 codes of int32 words, eight along a dimension: the code in bits 4 i of a word stands at place `order[i]`."""
    parts = [torch.empty(0)] * CODES_A_WORD
    for i, place in enumerate(order):
        parts[place] = (words >> 4 * i & 0xF).to(torch.uint8)
    return torch.stack(parts, dimension + 1).flatten(dimension, dimension + 1)


def refuse(method: str, what: str, mend: str = "use a checkpoint that is quantised in another way, or not at all") -> UserError:
    """The error for a scheme that is not read."""
    return UserError(f"quantization_config: {method} with {what} is not supported: {mend}")


def require(method: str, values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `UserError` where a key has another value than is allowed; keys that are absent are as None."""
    for key, wanted in allowed.items():
        value = values.get(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in wanted):
            raise refuse(method, f"{key} {quoted(value)}")


def int4_of_groups(method: str, group: Any, columns_too: bool = False) -> Packed:
    """The format for groups of a size; raises `UserError` for a size that there is none for."""
    format = FORMATS["int4"]
    assert isinstance(format, Packed)
    if group != format.group and not (columns_too and group in (None, -1)):
        raise refuse(method, f"groups of {quoted(group)}", f"use a checkpoint with groups of {format.group}")
    return format


def spread(scales: torch.Tensor, groups: int) -> torch.Tensor:
    """Scales [rows, 1 or groups] in fp32 for each group."""
    return scales.float().expand(-1, groups).contiguous()
