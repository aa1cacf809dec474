"""Enough of Gluon, on torch tensors, to run device functions of weight formats as Python: shared memory by its layouts, bit for
bit, and inline PTX instruction by instruction.  How tensors lie in registers is the compiler's business, and not looked at: but
for this, that of two elements which an instruction takes together the last axis has one beside the other."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.support.ptx import run

FORMATS = "megakernel.device.formats"
LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "DistributedLinearLayout", "BlockedLayout")


def constant(value: Any) -> Any:
    """A compile-time constant: itself, with a `value`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    kind = type(value)
    return type(kind.__name__, (kind,), {"value": property(lambda self: kind(self))})(value)


class Tensor:
    """A distributed tensor."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.shape, self.numel = data, list(data.shape), data.numel()
        self.type = SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        return Tensor(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[index])


def _operator(name: str, method: str) -> None:
    def apply(self: Tensor, other: Any) -> Tensor:
        return Tensor(getattr(self.data, method)(other.data if isinstance(other, Tensor) else other))

    setattr(Tensor, name, apply)


for _name in ("add", "sub", "mul", "mod", "floordiv", "and", "or", "lshift", "rshift", "eq", "radd", "rmul"):
    _operator(f"__{_name}__", f"__{_name}__")


@dataclass(frozen=True)
class Linear:
    """A linear layout of shared memory: the coordinates that each bit of an element's place stands for."""

    offset_bases: tuple[tuple[int, ...], ...]


@cache
def places(layout: Linear, shape: tuple[int, ...]) -> torch.Tensor:
    """Where each element lies."""
    place = torch.arange(math.prod(shape))
    at = torch.zeros(len(shape), len(place), dtype=torch.int64)
    for bit, basis in enumerate(layout.offset_bases):
        at ^= (place >> bit & 1) * torch.tensor(basis)[:, None]
    found = torch.full(shape, -1)
    found[tuple(at)] = place
    assert (found >= 0).all(), "two elements in one place"
    return found


@dataclass
class Memory:
    """Shared memory from a byte on, as elements of a shape."""

    bytes: torch.Tensor
    dtype: torch.dtype
    shape: list[int]
    layout: Any = None
    order: list[int] | None = None

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Memory:
        assert math.prod(shape) * dtype.itemsize <= len(self.bytes)
        return Memory(self.bytes, dtype, list(shape), layout)

    def index(self, number: int) -> Memory:
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        assert 0 <= number < self.shape[0]
        return Memory(self.bytes[number * size : (number + 1) * size], self.dtype, self.shape[1:], self.layout)

    def reshape(self, shape: Sequence[int]) -> Memory:
        assert not isinstance(self.layout, Linear)
        return Memory(self.bytes, self.dtype, list(shape), self.layout)

    def permute(self, order: list[int]) -> Memory:
        return Memory(self.bytes, self.dtype, self.shape, self.layout, order)

    @property
    def places(self) -> torch.Tensor:
        if isinstance(self.layout, Linear):
            found = places(self.layout, tuple(self.shape))
        else:
            found = torch.arange(math.prod(self.shape)).view(self.shape)
        return found if self.order is None else found.permute(self.order)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.bytes.view(self.dtype)[self.places])

    def store(self, values: Tensor) -> None:
        assert values.data.dtype == self.dtype
        self.bytes.view(self.dtype)[self.places.flatten()] = values.data.flatten()


@dataclass(frozen=True)
class Pointer:
    """Into numbers in global memory, by elements."""

    numbers: torch.Tensor
    index: Any = 0

    def __add__(self, places: Tensor) -> Pointer:
        return Pointer(self.numbers, places + self.index)


def copy_page(descriptor: Any, place: list[int], barrier: Any, memory: Memory) -> None:
    """What TMA copies: a box of a descriptor's lines."""
    lines, line = memory.shape
    assert line <= 256 and lines <= 256, "TMA takes no more"
    memory.store(Tensor(descriptor.lines[place[0] : place[0] + lines, :line]))


def inline_asm_elementwise(asm: str, constraints: str, args: list[Tensor], dtype: Any, is_pure: bool, pack: int) -> Any:
    """PTX on `pack` elements at a time, in registers of 32 bits."""
    registers: list[torch.Tensor] = []
    for arg in args:
        together = max(1, 4 // arg.data.dtype.itemsize)
        words = arg.data.contiguous().view(torch.int32)
        registers += [words[..., i :: pack // together] for i in range(pack // together)]
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    outputs = constraints.count("=")
    found = run(asm, registers, outputs)
    results = []
    for i, kind in enumerate(kinds):
        words = torch.stack(found[i :: len(kinds)], -1).flatten(-2)
        results.append(Tensor(words.view(kind)))
    return tuple(results) if isinstance(dtype, tuple) else results[0]


def mma(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    """Products of bf16, summed in more than fp32."""
    return Tensor((acc.data.double() + a.data.double() @ b.data.double()).float())


def plain(x: Any) -> Any:
    """A tensor's elements, or a number."""
    return x.data if isinstance(x, Tensor) else x


def broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shape of either."""
    shape = torch.broadcast_shapes(tuple(x.shape), tuple(y.shape))
    return Tensor(x.data.expand(shape)), Tensor(y.data.expand(shape))


def language() -> SimpleNamespace:
    """What formats use of Gluon's language."""
    names = {name: lambda *args, **named: None for name in LAYOUTS}
    return SimpleNamespace(
        **names,
        constexpr=constant,
        float32=torch.float32,
        bfloat16=torch.bfloat16,
        int32=torch.int32,
        int16=torch.int16,
        SwizzledSharedLayout=lambda vec, per_phase, max_phase, order: None,
        SharedLinearLayout=lambda offset_bases, block_bases, alignment: Linear(tuple(map(tuple, offset_bases))),
        arange=lambda start, stop, layout: Tensor(torch.arange(start, stop, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout: Tensor(torch.zeros(list(shape), dtype=dtype)),
        reshape=lambda x, shape: Tensor(x.data.reshape(list(shape))),
        permute=lambda x, order: Tensor(x.data.permute(order)),
        expand_dims=lambda x, axis: Tensor(x.data.unsqueeze(axis)),
        broadcast=broadcast,
        join=lambda x, y: Tensor(torch.stack([x.data, y.data], -1)),
        sum=lambda x, axis: Tensor(x.data.sum(axis)),
        where=lambda condition, x, y: Tensor(torch.where(condition.data, plain(x), plain(y))),
        load=lambda pointer: Tensor(pointer.numbers[pointer.index.data.long()]),
        convert_layout=lambda x, layout, assert_trivial: x,
        inline_asm_elementwise=inline_asm_elementwise,
    )


@contextmanager
def in_torch() -> Iterator[ModuleType]:
    """The package of twins, made anew with torch in Gluon's place."""
    gluon = SimpleNamespace(jit=lambda function: function, constexpr_function=lambda function: function, language=language())
    fakes: dict[str, Any] = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gluon.language,
        "triton.experimental.gluon.language.nvidia.hopper": SimpleNamespace(mma_v2=mma),
        "megakernel.device.compat": SimpleNamespace(
            reinterpret=lambda memory, *seen: memory.reinterpret(*seen), copy_page=copy_page
        ),
    }
    package = importlib.import_module("megakernel.device")
    real = importlib.import_module(FORMATS)
    kept = {name: module for name, module in sys.modules.items() if name.startswith(FORMATS)}
    with patch.dict(sys.modules, fakes):
        for name in kept:
            del sys.modules[name]
        try:
            yield importlib.import_module(FORMATS)
        finally:
            package.formats = real  # type: ignore[attr-defined]
