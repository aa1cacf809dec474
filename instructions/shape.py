"""What a program is made for, and where its activations lie: one source of sizes for host, CPU machine and kernel.

The sizes are those of `instructions.dimensions`.  Buffers are not listed here: every instruction says which it brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from instructions.dimensions import HELD_PAGES, MMA_COLUMNS, Dimensions, ceil_div, next_power_of_two
from instructions.registry import INSTRUCTIONS

__all__ = [
    "ALIGN",
    "ANNOUNCED",
    "HELD_PAGES",
    "MMA_COLUMNS",
    "VACANT",
    "Buffer",
    "Shape",
    "ceil_div",
    "next_power_of_two",
]

ALIGN = 32  # fp32 elements: every buffer layer starts on a 128-byte line
VACANT = 0x7FC0FFEE  # bits of a place whose value has not come: a NaN that no arithmetic gives
BROUGHT = sorted((buffer for kind in INSTRUCTIONS for buffer in kind.BRINGS), key=lambda buffer: not buffer.announced)
ANNOUNCED = tuple(buffer.name for buffer in BROUGHT if buffer.announced)  # buffers whose values announce themselves


class Buffer(NamedTuple):
    """`layers` runs of `rows` fp32 values; layer l starts at element `base + l * stride` of the activations."""

    layers: int
    rows: int
    base: int
    stride: int


@dataclass(frozen=True)
class Shape(Dimensions):
    """The sizes of one decode program, and its activation buffers."""

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """Activation buffers by name.  "token" and "kv" hold no fp32 activations (rows of state and of the cache).

        Those named in ANNOUNCED come first.  The machine keeps two copies of them, for even and for odd epochs: whoever
        writes a row of this token's copy makes the same row of the other VACANT, and a reader takes a row once it is not.
        """
        table, base = {}, 0
        for brought in BROUGHT:
            layers, rows = brought.layers(self), brought.rows(self)
            stride = ceil_div(rows, ALIGN) * ALIGN
            table[brought.name] = Buffer(layers, rows, base, stride)
            base += layers * stride
        table["token"] = Buffer(1, 1, base, 0)
        table["kv"] = Buffer(self.config.num_layers, self.new_rows, base, 0)
        return table

    @property
    def announced_elements(self) -> int:
        """fp32 elements of the buffers named in ANNOUNCED, once."""
        return [*self.buffers.values()][len(ANNOUNCED)].base

    @property
    def activation_elements(self) -> int:
        """fp32 elements of all activation buffers, each once; the second copy of the announced ones begins here."""
        return self.buffers["token"].base

    @property
    def arena_elements(self) -> int:
        """fp32 elements of all activation buffers with the second copy."""
        return self.activation_elements + self.announced_elements
