"""Gluon's vector language in NumPy: kernels that load, compute and store, with neither shared memory nor tensor cores, run as
their own source says, one program after another.

Layouts are not looked at: what is compared here are values and places in memory, of which every access is checked.  Elements
that are masked off, and those beyond what was loaded, are NaN or a number that is nobody's place.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.support import ROOT


class Values(np.ndarray):
    """A tensor of the kernel."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Values:
        """As `gl.tensor.to`; bf16 are fp32 that bf16 holds."""
        if dtype == "bfloat16":
            rounded = torch.from_numpy(np.asarray(self, np.float32).copy()).bfloat16().float().numpy()
            return rounded.view(Values)
        return values(self.view(dtype) if bitcast else self.astype(dtype))


def values(array: Any) -> Values:
    """An array, or a number, as a tensor."""
    return np.asarray(array).view(Values)


@dataclass(frozen=True)
class Pointer:
    """Into an array, by elements."""

    array: np.ndarray
    index: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.array, self.index + more)


def places(pointer: Pointer, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Indices and mask, of one shape; nothing outside the array may be asked for."""
    index, wanted = np.broadcast_arrays(np.asarray(pointer.index), np.asarray(mask))
    asked = index[wanted]
    assert ((asked >= 0) & (asked < pointer.array.size)).all(), "outside the array"
    return index, wanted


def load(pointer: Pointer, mask: Any = True, other: float = 0) -> Values:
    """`other` where the mask is not."""
    index, wanted = places(pointer, mask)
    found = np.where(wanted, pointer.array.reshape(-1)[np.where(wanted, index, 0)], np.asarray(other, pointer.array.dtype))
    return values(found)


def store(pointer: Pointer, stored: Any, mask: Any = True) -> None:
    """No place is written twice by one store, unless with the same value."""
    index, wanted = places(pointer, mask)
    written = np.broadcast_to(np.asarray(stored), index.shape)[wanted]
    pointer.array.reshape(-1)[index[wanted]] = written
    assert np.array_equal(pointer.array.reshape(-1)[index[wanted]], written.astype(pointer.array.dtype), equal_nan=True)


def scan(found: Values, axis: int, combine: Callable[[Any, Any], Any]) -> Values:
    """Running results along an axis."""
    result = np.array(found)
    moved = np.moveaxis(result, axis, 0)
    for place in range(1, len(moved)):
        moved[place] = combine(moved[place - 1], moved[place])
    return values(result)


def language(program: int, programs: int) -> SimpleNamespace:
    """What these kernels use of Gluon."""
    return SimpleNamespace(
        constexpr=lambda value: value,
        static_range=range,
        program_id=lambda axis: values(np.int32(program)),
        num_programs=lambda axis: programs,
        BlockedLayout=lambda *parts: None,
        SliceLayout=lambda *parts: None,
        int32=np.int32,
        int64=np.int64,
        float32=np.float32,
        bfloat16="bfloat16",
        arange=lambda start, stop, layout: values(np.arange(start, stop, dtype=np.int32)),
        full=lambda shape, value, dtype, layout: values(np.full(shape, value, dtype)),
        zeros=lambda shape, dtype, layout: values(np.zeros(shape, dtype)),
        zeros_like=lambda like: values(np.zeros_like(like)),
        load=load,
        store=store,
        cdiv=lambda dividend, divisor: -(-dividend // divisor),
        where=lambda condition, yes, no: values(np.where(condition, yes, no)),
        minimum=lambda first, second: values(np.minimum(first, second)),
        maximum=lambda first, second: values(np.maximum(first, second)),
        exp=lambda found: values(np.exp(found)),
        rsqrt=lambda found: values(np.float32(1) / np.sqrt(found)),
        max=lambda found, axis: values(found.max(axis)),
        sum=lambda found, axis: values(found.sum(axis, dtype=found.dtype)),
        reshape=lambda found, shape: found.reshape(shape),
        permute=lambda found, order: found.transpose(order),
        split=lambda found: (found[..., 0], found[..., 1]),
        convert_layout=lambda found, layout: found,
        associative_scan=scan,
    )


class Room:
    """Shared memory through which a piece goes from one layout to another."""

    def slice(self, start: int, length: int, dim: int = 0) -> Room:
        """Of a piece with so many tokens."""
        return self

    def store(self, held: Values) -> None:
        self.held = held

    def load(self, layout: Any) -> Values:
        return self.held


@cache
def module_of(path: Path) -> ast.Module:
    """A device module, whose functions have neither decorators nor annotations, and no defaults."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.args.defaults = [], []
            for argument in node.args.args:
                argument.annotation = None
    return tree


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """What a device module defines, by name."""
    return {node.name: node for node in module_of(path).body if isinstance(node, ast.FunctionDef)}


@cache
def compiled(node: ast.stmt) -> Any:
    """One statement of a device module, to be run."""
    return compile(ast.Module([node], []), "device", "exec")


def define(node: ast.stmt, names: dict[str, Any]) -> None:
    """Run one statement of a device module."""
    exec(compiled(node), names)


def kernel_of(module: str, name: str, known: Mapping[str, Any], also: Iterable[tuple[str, str]] = ()) -> Callable[..., None]:
    """A kernel of `megakernel/device/<module>.py` as a function of (programs, *arguments), NumPy arrays for its pointers.

    known: what its constants are stated with, and other names that it uses.  also: functions of other device modules.
    """
    device = ROOT / "megakernel" / "device"
    body = module_of(device / f"{module}.py").body
    stated = [node for node in body if isinstance(node, ast.Assign)]
    called = [functions(device / f"{other}.py")[function] for other, function in also]

    def run(programs: int, *arguments: Any) -> None:
        pointers = [Pointer(each) if isinstance(each, np.ndarray) else each for each in arguments]
        for program in range(programs):
            names: dict[str, Any] = {**known, "gl": language(program, programs)}
            names |= {"let_next_start": lambda: None, "wait_for_previous": lambda: None}
            names |= {"read_chunk": lambda words: SimpleNamespace(start=load(words), count=load(words + 1))}
            for node in [*stated, *called, *functions(device / f"{module}.py").values()]:
                define(node, names)
            with np.errstate(invalid="ignore"):  # of what is masked off
                names[name](*pointers)

    return run
