"""What a program is made for, and where its activations lie: one source of sizes for host, CPU machine and kernel.

The sizes are those of `instructions.dimensions`.  Buffers are not listed here: every instruction says which it brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from instructions.base import Activation
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
BROUGHT = sorted(
    (buffer for kind in INSTRUCTIONS for buffer in kind.BRINGS), key=lambda buffer: (buffer.sliced, not buffer.announced)
)
ANNOUNCED = tuple(buffer.name for buffer in BROUGHT if buffer.announced)  # buffers whose values announce themselves


class Buffer(NamedTuple):
    """`layers` runs of `rows` fp32 values; layer l starts at element `base + l * stride` of the activations.

    `column` is how far behind a row of one column that of the next lies; 0 where rows of all columns have names of their own.
    `second` is how far behind each place its second one lies; 0 where there is one place alone.
    """

    layers: int
    rows: int
    base: int
    stride: int
    column: int = 0
    second: int = 0


def aligned(elements: int) -> int:
    """So many fp32 elements, rounded up to whole 128-byte lines."""
    return ceil_div(elements, ALIGN) * ALIGN


@dataclass(frozen=True)
class Shape(Dimensions):
    """The sizes of one decode program, and its activation buffers."""

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """Activation buffers by name.  "token" and "kv" hold no fp32 activations (rows of state and of the cache).

        The machine keeps two copies of those named in ANNOUNCED, for even and for odd epochs: whoever writes a row of this
        token's copy makes the same row of the other VACANT, and a reader takes a row once it is not.  What depends on the
        number of slices comes last, so that all programs of a model have everything else in the same places.
        """
        sizes = {brought: self._sizes(brought) for brought in BROUGHT}
        copied = [brought for brought in BROUGHT if brought.announced and not brought.sliced]
        both = sum(layers * stride for layers, _, stride, _ in (sizes[brought] for brought in copied))
        table, base = {}, 0
        for brought, (layers, rows, stride, column) in sizes.items():
            own = layers * stride
            second = 0 if not own else both if brought in copied else own if brought.announced else 0
            table[brought.name] = Buffer(layers, rows, base, stride, column, second)
            base += own
            if brought == copied[-1]:
                base += both  # the second copy of all of them
            elif brought not in copied:
                base += second
        table["token"] = Buffer(1, 1, base, 0)
        table["kv"] = Buffer(self.config.num_layers, self.sequences * self.new_rows, base, 0)
        return table

    def _sizes(self, brought: Activation) -> tuple[int, int, int, int]:
        """Layers, rows of one, the distance between layers, and that between columns."""
        layers, rows = brought.layers(self), brought.rows(self)
        if brought.apart:
            return layers, self.columns * rows, aligned(self.columns * rows), 0
        return layers, rows, self.columns * aligned(rows), aligned(rows)

    @property
    def arena_elements(self) -> int:
        """fp32 elements of all activation buffers, with the second places of those that have some."""
        return self.buffers["token"].base
