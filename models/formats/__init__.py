"""The formats that weights may have on the tape, by name, and which of them a model's matrices have."""

from __future__ import annotations

from typing import NamedTuple

from models.errors import UserError
from models.formats.base import Packed, WeightFormat
from models.formats.fp8 import FP8
from models.formats.int4 import INT4
from models.formats.plain import BF16, FP32
from models.formats.q4_0 import Q4_0
from models.formats.q4_1 import Q4_1
from models.formats.q8_0 import Q8_0

__all__ = ["FORMATS", "PLAIN", "Formats", "Packed", "WeightFormat", "NAMES", "check_formats", "chosen_formats", "format_of"]

FORMATS: dict[str, WeightFormat] = {format.name: format for format in (BF16, FP32, FP8, INT4, Q8_0, Q4_0, Q4_1)}
PLAIN_NAME = "plain"
_PLAIN = {2: BF16, 4: FP32}


class Formats(NamedTuple):
    """Names of the formats of a layer's matrices and of the LM head; "plain" is the activations' own type.

    The embedding is plain always: a step reads one row of it.
    """

    body: str = PLAIN_NAME
    head: str = PLAIN_NAME


PLAIN = Formats()


def format_of(name: str, itemsize: int) -> WeightFormat:
    """The format of a name, beside activations of `itemsize` bytes."""
    return _PLAIN[itemsize] if name == PLAIN_NAME else FORMATS[name]


NAMES = ("bf16", *(name for name, format in FORMATS.items() if not format.plain))  # as options have them


def chosen_formats(weights: str | None, head: str | None = None, stored: Formats = PLAIN) -> Formats:
    """The formats that options name: of a layer's matrices and, where it is told apart, of the head; where neither is named
    those that are stored."""
    body = stored.body if weights is None else weights
    top = head or (stored.head if weights is None else weights)
    formats = Formats(*(PLAIN_NAME if name == BF16.name else name for name in (body, top)))
    check_formats(formats, 2)
    return formats


def check_formats(formats: Formats, itemsize: int) -> None:
    """Refuse, with a UserError, formats that no program can have: quantised weights are widened to bf16."""
    packed = [name for name, format in FORMATS.items() if not format.plain]
    for name in formats:
        if name != PLAIN_NAME and name not in packed:
            raise UserError(f"weights cannot be kept as {name!r}: choose one of {', '.join(packed)}, or bf16")
        if name in packed and itemsize != 2:
            raise UserError(f"{name} weights are widened to bf16: choose bfloat16 activations, or say --weights bf16")
