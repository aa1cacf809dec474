"""Shared memory by its layouts, barriers in it, and what TMA copies there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from tests.support.gluon.grid import Watch
from tests.support.gluon.tensor import Tensor, shaped


@dataclass(frozen=True)
class Swizzled:
    """Rows of which each has its pieces of `vec` elements exchanged, by its number; of the last two dimensions.  Where wide
    rows are `cut`, lines of `vec * max_phase` elements lie together, those of all rows one after another."""

    vec: int
    per_phase: int
    max_phase: int
    cut: bool = False


@dataclass(frozen=True)
class Linear:
    """The coordinates that each bit of an element's place stands for."""

    offset_bases: tuple[tuple[int, ...], ...]


FLAT = Swizzled(1, 1, 1)
WORD_BYTES = 128  # of one of the ring's words, 32 times


@cache
def places(layout: Swizzled | Linear, shape: tuple[int, ...]) -> torch.Tensor:
    """Where each element lies."""
    place = torch.arange(math.prod(shape))
    if isinstance(layout, Swizzled):
        if layout.max_phase == 1:
            return place.view(shape)
        width = shape[-1]
        row, column = place // width, place % width
        phase = row % shape[-2] // layout.per_phase % layout.max_phase
        swizzled = ((column // layout.vec) ^ phase) * layout.vec + column % layout.vec
        if layout.cut and width > (line := layout.vec * layout.max_phase):
            whole, row = row // shape[-2] * shape[-2], row % shape[-2]
            return (whole * width + (swizzled // line * shape[-2] + row) * line + swizzled % line).view(shape)
        return (row * width + swizzled).view(shape)
    at = torch.zeros(len(shape), len(place), dtype=torch.int64)
    for bit, basis in enumerate(layout.offset_bases):
        at ^= (place >> bit & 1) * torch.tensor(basis)[:, None]
    found = torch.full(shape, -1)
    found[tuple(at)] = place
    assert (found >= 0).all(), "two elements in one place"
    return found


@dataclass
class Memory:
    """Shared memory from a byte on, as elements of a shape.  `before`: leading dimensions that the layout does not know."""

    bytes: torch.Tensor
    dtype: torch.dtype
    shape: list[int]
    layout: Any = FLAT
    cuts: tuple[tuple[int, int, int], ...] = ()  # of the elements: a dimension, where it begins, how many
    order: list[int] | None = None

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[Any], layout: Any) -> Memory:
        size = math.prod(shaped(shape)) * dtype.itemsize
        assert size <= len(self.bytes), f"{size} bytes of {len(self.bytes)}"
        return Memory(self.bytes[:size], dtype, shaped(shape), layout)

    def index(self, number: Any) -> Memory:
        size, place = math.prod(self.shape[1:]) * self.dtype.itemsize, int(number)
        assert 0 <= place < self.shape[0], f"{place} of {self.shape[0]}"
        return Memory(self.bytes[place * size : (place + 1) * size], self.dtype, self.shape[1:], self.layout)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Memory:
        return replace(self, cuts=(*self.cuts, (dim, int(start), int(length))))

    def permute(self, order: list[int]) -> Memory:
        return replace(self, order=order)

    def reshape(self, shape: Sequence[Any]) -> Memory:
        assert isinstance(self.layout, Swizzled) and self.layout.max_phase == 1
        return Memory(self.bytes, self.dtype, shaped(shape), self.layout)

    @property
    def places(self) -> torch.Tensor:
        found = places(self.layout, tuple(self.shape))
        for dim, start, length in self.cuts:
            assert start + length <= found.shape[dim]
            found = found.narrow(dim, start, length)
        return found if self.order is None else found.permute(self.order)

    def load(self, layout: Any = None) -> Tensor:
        if len(self.bytes) <= WORD_BYTES:
            Watch.let_others()  # who asks again and again for a word gives way
        return Tensor(self.bytes.view(self.dtype)[self.places])

    def store(self, values: Tensor) -> None:
        assert values.data.dtype == self.dtype, f"{values.data.dtype} to {self.dtype}"
        assert list(self.places.shape) == values.shape, f"{values.shape} to {self.shape}"
        self.bytes.view(self.dtype)[self.places.flatten()] = values.data.flatten()


@dataclass
class Barrier:
    """How many arrivals and bytes the current phase still needs, and how many phases are over."""

    count: int
    left: int = 0
    bytes: int = 0
    over: int = 0

    def __post_init__(self) -> None:
        self.left = self.count

    def arrive(self, count: int = 1) -> None:
        assert count <= self.left, "more arrivals than the barrier counts"
        self.left -= count
        self.turn()

    def land(self, count: int) -> None:
        self.bytes -= count
        self.turn()

    def turn(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.over += 1
            self.left = self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase of a parity is over, of the last two."""
        return self.over % 2 != parity


@dataclass
class Descriptor:
    """What TMA is told of a tensor in global memory, and the box that it copies at a time."""

    elements: torch.Tensor
    box: list[int]
    layout: Swizzled

    @property
    def dtype(self) -> torch.dtype:
        return self.elements.dtype

    def box_at(self, place: list[int]) -> torch.Tensor:
        """Elements beyond the tensor are zeros."""
        found = torch.zeros(self.box, dtype=self.dtype)
        sizes = [min(size, max(0, whole - at)) for at, size, whole in zip(place, self.box, self.elements.shape, strict=True)]
        assert min(place) >= 0
        if min(sizes) > 0:
            inside = self.elements[tuple(slice(at, at + size) for at, size in zip(place, sizes, strict=True))]
            found[tuple(slice(0, size) for size in sizes)] = inside
        return found


@dataclass
class Block:
    """The shared memory of a thread block: what was allocated, and its barriers by where they lie."""

    barriers: dict[int, Barrier] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    missing: bool = False  # what the consumer's threads have noted in a register of theirs

    def allocate(self, dtype: torch.dtype, shape: Sequence[Any], layout: Any) -> Memory:
        """Filled with what is no number, as nobody has written there yet."""
        size = math.prod(shaped(shape)) * dtype.itemsize
        self.kept.append(torch.full((size,), 0xFF, dtype=torch.uint8))
        return Memory(self.kept[-1], dtype, shaped(shape), layout)

    def changes(self) -> int:
        """What its words of few bytes hold now."""
        return hash(tuple(bytes(each.numpy()) for each in self.kept if len(each) <= WORD_BYTES))

    def barrier(self, memory: Memory) -> Barrier:
        return self.barriers[memory.bytes.data_ptr()]
