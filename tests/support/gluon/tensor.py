"""Tensors, scalars among them, and pointers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.gluon.grid import Watch


class Tensor:
    """A distributed tensor; a scalar where it has no dimensions."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def type(self) -> SimpleNamespace:
        """Its layout is nobody's business here."""
        return SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        if dtype is UINT32:
            return Unsigned(self.data.long())
        return Tensor(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[index])

    def beside(self, other: Any) -> torch.dtype | None:
        """The type that a Python number has beside this."""
        if isinstance(other, bool):
            return None
        return self.dtype if isinstance(other, int) or self.dtype.is_floating_point else torch.float32

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    __int__ = __index__

    def __neg__(self) -> Tensor:
        return Tensor(-self.data)

    def __hash__(self) -> int:
        return id(self)


UINT32 = "uint32"  # which torch hardly computes with
WORD = 2**32 - 1


class Unsigned(Tensor):
    """Words of 32 bits without a sign, as int64."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__(data if data.dtype == torch.bool else data & WORD)


def plain(value: Any) -> Any:
    """What torch takes: a tensor, or a number of Python's own."""
    if isinstance(value, Tensor):
        return value.data
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, int) else float(value)


def _divide(one: Any, other: Any) -> Any:
    return torch.div(one, other, rounding_mode="trunc")  # as C does


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": torch.true_divide,
    "floordiv": _divide,
    "mod": torch.fmod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


def _define(name: str, apply: Callable[[Any, Any], Any]) -> None:
    def forward(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return other + self
        return type(self)(apply(self.data, plain(other)))

    def backward(self: Tensor, other: Any) -> Tensor:
        return type(self)(apply(torch.as_tensor(plain(other), dtype=self.beside(other)), self.data))

    setattr(Tensor, f"__{name}__", forward)
    setattr(Tensor, f"__r{name}__", backward)


for _name, _apply in OPERATIONS.items():
    _define(_name, _apply)


def full(shape: Sequence[Any], value: Any, dtype: Any) -> Tensor:
    """As many of one value."""
    if dtype is UINT32:
        return Unsigned(tensor(value, torch.int64).expand(shaped(shape)))
    return Tensor(tensor(value, dtype).expand(shaped(shape)).clone())


def tensor(value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A value of the language as torch has it: Python's numbers are int32 or fp32."""
    value = plain(value)
    if isinstance(value, torch.Tensor):
        return value if dtype is None else value.to(dtype)
    usual = torch.bool if isinstance(value, bool) else torch.int32 if isinstance(value, int) else torch.float32
    if usual == torch.int32 and not -(2**31) <= value < 2**31:
        usual = torch.int64
    return torch.tensor(value, dtype=dtype or usual)


def alike(*values: Any) -> list[torch.Tensor]:
    """Values with one type: that of the tensors among them."""
    kinds = [value.dtype for value in values if isinstance(value, Tensor)]
    if not kinds:
        found = [tensor(value) for value in values]
        kinds = [each.dtype for each in found]
    kind = kinds[0]
    for other in kinds[1:]:
        kind = torch.promote_types(kind, other)
    if kind == torch.int32 and any(isinstance(value, float) for value in values):
        kind = torch.float32
    return [tensor(value, kind) for value in values]


@dataclass(eq=False)
class Pointer:
    """Into numbers in global memory, by elements."""

    numbers: torch.Tensor  # of one dimension
    index: Any = 0  # an int or an int64 tensor
    range: tuple[int, int] | None = None  # addresses of what was asked for

    @property
    def shape(self) -> list[int]:
        return list(self.index.shape) if isinstance(self.index, torch.Tensor) else []

    @property
    def type(self) -> SimpleNamespace:
        """As a tensor's."""
        return SimpleNamespace(layout=None)

    def __add__(self, more: Any) -> Pointer:
        more = plain(more)
        if isinstance(more, torch.Tensor):
            more = more.long()
        return Pointer(self.numbers, self.index + more)

    __radd__ = __add__

    def __sub__(self, less: Any) -> Pointer:
        return self + -less

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and which of them are wanted; nothing outside the numbers may be."""
        index = torch.as_tensor(self.index, dtype=torch.int64)
        wanted = torch.as_tensor(True if mask is None else plain(mask), dtype=torch.bool)
        index, wanted = torch.broadcast_tensors(index, wanted)
        asked = index[wanted]
        if asked.numel():
            first, last = int(asked.min()), int(asked.max())
            if first < 0 or last >= len(self.numbers):
                raise IndexError(f"places {first} to {last} of {len(self.numbers)} numbers")
            begin, size = self.numbers.data_ptr(), self.numbers.element_size()
            self.range = begin + first * size, begin + (last + 1) * size - 1
        return index, wanted

    def load(self, mask: Any = None, other: Any = None) -> Tensor:
        """`other`, else 0, where the mask is not."""
        index, wanted = self.places(mask)
        if self.range is not None:
            Watch.loaded.append(self.range)
        found = self.numbers[torch.where(wanted, index, 0)]
        if mask is None:
            return Tensor(found)
        return Tensor(torch.where(wanted, found, tensor(0 if other is None else other, found.dtype)))

    def store(self, value: Any, mask: Any = None) -> None:
        """Places that are stored to twice must be given the same."""
        index, wanted = self.places(mask)
        stored = torch.broadcast_to(tensor(value).to(self.numbers.dtype), index.shape)[wanted]
        self.numbers[index[wanted]] = stored
        if self.range is not None:
            Watch.store(*self.range)
        seen = self.numbers[index[wanted]]
        assert bool(((seen == stored) | ((seen != seen) & (stored != stored))).all()), "two values for one place"


def axes(found: torch.Tensor, reduce: Callable[[torch.Tensor, int], torch.Tensor], axis: int | None) -> Tensor:
    """A reduction along an axis, or over all."""
    if axis is None:
        return Tensor(reduce(found.reshape(-1), 0))
    return Tensor(reduce(found, axis))


def _extreme(largest: bool) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def reduce(found: torch.Tensor, axis: int) -> torch.Tensor:
        """What is no number does not count, unless there is nothing else."""
        if not found.dtype.is_floating_point:
            return found.amax(axis) if largest else found.amin(axis)
        edge = float("-inf") if largest else float("inf")
        clean = torch.where(found != found, edge, found)
        result = clean.amax(axis) if largest else clean.amin(axis)
        return torch.where((found != found).all(axis), float("nan"), result)

    return reduce


maxima, minima = _extreme(True), _extreme(False)


def sums(found: torch.Tensor, axis: int) -> torch.Tensor:
    return found.sum(axis, dtype=torch.int32 if found.dtype == torch.bool else found.dtype)


def shaped(shape: Sequence[Any]) -> list[int]:
    """A shape as plain integers."""
    return [int(size) for size in shape]
