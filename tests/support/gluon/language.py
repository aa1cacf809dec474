"""The names of Gluon that device functions use, and the package of them made anew with these in Gluon's place."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.support.gluon import ptx
from tests.support.gluon.grid import Grid
from tests.support.gluon.memory import Barrier, Block, Descriptor, Linear, Memory, Swizzled
from tests.support.gluon.tensor import (
    UINT32,
    Pointer,
    Tensor,
    Unsigned,
    alike,
    axes,
    full,
    maxima,
    minima,
    plain,
    shaped,
    sums,
    tensor,
)

DEVICE = "megakernel.device"
CYCLES = 1000  # that a step of the whole grid is taken to last
LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "DistributedLinearLayout", "BlockedLayout")


class Expired(AssertionError):
    """A wait of the kernel that its patience has ended."""


@dataclass(frozen=True)
class Place:
    """Where an actor is: its block's number of how many, its warps, and the block."""

    grid: Grid
    program: int
    programs: int
    block: Block
    warps: int = 4


CURRENT = threading.local()


def here() -> Place:
    """Of the actor that runs."""
    place: Place = CURRENT.place
    return place


def constant(value: Any) -> Any:
    """A compile-time constant: itself, with a `value`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | tuple) or hasattr(value, "_fields"):
        return value
    kind = type(value)
    return type(kind.__name__, (kind,), {"value": property(lambda self: kind(self))})(value)


class Number(int):
    """A number of a loop, which is a scalar in the language and a plain number here."""

    def to(self, dtype: Any) -> Tensor:
        return Tensor(tensor(int(self))).to(dtype)


def _number(name: str) -> None:
    def apply(self: Number, other: Any) -> Any:
        found = getattr(int, name)(self, other)
        return found if found is NotImplemented else Number(found)

    setattr(Number, name, apply)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "lshift", "rshift"):
    _number(f"__{_name}__")
    _number(f"__r{_name}__")


def counted(*bounds: Any) -> Iterator[Number]:
    """As `range`, of scalars."""
    return map(Number, range(*map(int, bounds)))


def where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(yes, Pointer):
        raise TypeError("pointers are not chosen")
    first, second = alike(yes, no)
    return Tensor(torch.where(tensor(condition).bool(), first, second))


def nvmma_layout(swizzle_byte_width: int, element_bitwidth: int, rank: int, transposed: bool = False) -> Swizzled:
    """As TMA and wgmma have it; one that is transposed is for stores and loads alone, wherever they lie."""
    pieces = 128 // element_bitwidth
    return Swizzled(pieces, 1, 8, cut=True) if swizzle_byte_width == 128 and not transposed else Swizzled(1, 1, 1)


def both(apply: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda one, other: Tensor(apply(*alike(one, other)))


def allocate(dtype: torch.dtype, shape: Any, layout: Any) -> Memory:
    return here().block.allocate(dtype, shape, layout)


def load(pointer: Pointer, mask: Any = None, other: Any = None, volatile: bool = False, cache_modifier: str = "") -> Tensor:
    return pointer.load(mask, other)


def atomic_add(pointer: Pointer, value: Any, sem: str, scope: str) -> Tensor:
    before = pointer.load()
    pointer.store(before + value)
    return before


def warp_specialize(roles: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    """The first role goes on here, the others beside it; all have ended when this returns."""
    (first, arguments), *others = roles
    place, left = here(), [len(roles) - 1]

    def role(body: Any, given: tuple[Any, ...], count: int) -> Callable[[], None]:
        def live() -> None:
            CURRENT.place = Place(place.grid, place.program, place.programs, place.block, count)
            body(*given)
            left[0] -= 1

        return live

    for (body, given), count in zip(others, warps, strict=True):
        place.grid.add(place.block, role(body, given, count))
    first(*arguments)
    place.grid.pause(lambda: left[0] == 0)


def barrier_of(memory: Memory) -> Barrier:
    return here().block.barrier(memory)


def init(memory: Memory, count: int) -> None:
    here().block.barriers[memory.bytes.data_ptr()] = Barrier(count)


def expect(memory: Memory, count: Any) -> None:
    found = barrier_of(memory)
    found.bytes += int(count)
    found.arrive()


def wait(memory: Memory, parity: Any, pred: Any = True) -> None:
    found, wanted = barrier_of(memory), int(parity)
    if pred and not found.passed(wanted):
        here().grid.pause(lambda: found.passed(wanted))


def copy_page(descriptor: Descriptor, place: list[Any], barrier: Memory, memory: Memory) -> None:
    """Lands later, in a moment of its own."""
    found, at = barrier_of(barrier), [int(each) for each in place]
    memory.store(Tensor(torch.full(memory.places.shape, float("nan"), dtype=memory.dtype)))

    def land() -> None:
        box = descriptor.box_at(at)
        memory.store(Tensor(box))
        found.land(box.numel() * box.dtype.itemsize)

    here().grid.copies.append(land)


def mma(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    """Products of bf16, summed in more than fp32."""
    return Tensor((acc.data.double() + a.data.double() @ b.data.double()).float())


def warpgroup_mma(a: Any, b: Memory, acc: Tensor, use_acc: Any = True, is_async: bool = False) -> Tensor:
    """At once, though the instruction may be under way until it is waited for."""
    left = a.load() if isinstance(a, Memory) else a
    return mma(left, b.load(), acc if use_acc else Tensor(torch.zeros_like(acc.data)))


def warpgroup_mma_wait(number: int, deps: list[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def associative_scan(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Running results along an axis."""
    rows = list(x.data.unbind(axis))
    for place in range(1, len(rows)):
        rows[place] = combine(Tensor(rows[place - 1]), Tensor(rows[place])).data
    return Tensor(torch.stack(rows, axis))


def elementwise(asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """Inline PTX: what the kernel's own texts mean; of those that compute, instruction by instruction."""
    text = " ".join(asm.split())
    if "%clock64" in text or "%globaltimer" in text:
        here().grid.pause()
        return Tensor(torch.tensor(here().grid.steps * CYCLES, dtype=torch.int64))
    if text.startswith("ld.acquire"):
        here().grid.pause()
        return args[0].load()
    if "atom.relaxed.gpu.global.cas" in text:
        names = ("place", "record", "counter", "wanted", "seen", "position")
        told = dict(zip(names if len(args) == 7 else ("place", "record", "position"), map(plain, args[1:]), strict=True))
        raise Expired(f"SM {here().program} is stuck: { ({name: int(value) for name, value in told.items()}) }")
    if "st.relaxed.gpu.global" in text:  # four side by side say for each of them where it lies
        target, other, bits, mask = args
        vacant = int(re.findall(r"(?:\[\$2\]|mov.b32 vacant), (-?\d+)", text)[0])
        for pointer, value in ((target, bits), (other, vacant)):
            Pointer(pointer.numbers.view(torch.int32), pointer.index).store(value, mask != 0)
        return Tensor(torch.tensor(0, dtype=torch.int32))
    if "missing_here" in text:  # every thread of a block is one actor
        block, missing = here().block, here().block.missing
        if not args:
            block.missing = False
            return Tensor(torch.tensor(int(missing), dtype=torch.int32))
        block.missing = missing or bool((tensor(args[0]) != 0).any())
        return args[0]
    if "barrier.cta.red.or" in text or "vote.sync.any" in text:
        return Tensor((tensor(args[0]) != 0).any().to(torch.int32))
    if "%tid.x" in text:
        return Tensor(torch.tensor(1, dtype=torch.int32))
    if text.startswith("mov.u32 $0, %laneid"):
        return Tensor(torch.tensor(0, dtype=torch.int32))
    if "ld.global.b32 $0" in text:  # each lane of a warp its own
        return (args[0] + Tensor(torch.arange(32))).load()
    if found := re.match(r"shfl\.sync\.idx\.b32 \$0, \$1, (\d+),", text):
        return Tensor(tensor(args[0])[..., int(found[1])])
    if "shfl.sync.bfly.b32 other, $1, 4," in text:
        return neighbours(*args)
    if "nanosleep" in text:
        block, seen = here().block, here().block.changes()
        here().grid.pause(rather=lambda: block.changes() != seen)
    if not args or any(word in text for word in ("prefetch", "fence", "nanosleep", "pmevent")):
        return Tensor(torch.tensor(0, dtype=torch.int32))
    return computed(asm, constraints, args, dtype, pack)


def neighbours(values: Tensor, odd: Tensor) -> Tensor:
    """What accumulators make with those of the neighbouring row, as one word; rows lie along the last axis of `odd`."""
    axis = max(number for number, size in enumerate(odd.data.shape) if size > 1)
    pairs = values.data.unflatten(axis, (-1, 2))
    both = torch.stack([pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)], -1).bfloat16().contiguous()
    return Tensor(both.view(torch.int32)[..., 0].repeat_interleave(2, axis))


def computed(asm: str, constraints: str, args: list[Tensor], dtype: Any, pack: int) -> Any:
    """PTX on `pack` elements at a time, in registers of 32 bits."""
    registers: list[torch.Tensor] = []
    for arg in args:
        together = max(1, 4 // arg.data.dtype.itemsize)
        words = arg.data.contiguous().view(torch.int32)
        registers += [words[..., i :: pack // together] for i in range(pack // together)]
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    found = ptx.run(asm, registers, constraints.count("="))
    results = [Tensor(torch.stack(found[i :: len(kinds)], -1).flatten(-2).view(kind)) for i, kind in enumerate(kinds)]
    return tuple(results) if isinstance(dtype, tuple) else results[0]


def umulhi(one: Unsigned, other: Unsigned) -> Unsigned:
    """The upper half of products of 64 bits; Python's integers are long enough."""
    products = [a * b >> 32 for a, b in zip(one.data.flatten().tolist(), other.data.flatten().tolist(), strict=True)]
    return Unsigned(torch.tensor(products, dtype=torch.int64).view(one.data.shape))


def language() -> SimpleNamespace:
    """Gluon's."""
    names: dict[str, Any] = {name: lambda *args, **named: None for name in LAYOUTS}
    return SimpleNamespace(
        **names,
        constexpr=constant,
        tensor=Tensor,
        shared_memory_descriptor=Memory,
        bfloat16=torch.bfloat16,
        float32=torch.float32,
        int64=torch.int64,
        int32=torch.int32,
        uint32=UINT32,
        int16=torch.int16,
        SwizzledSharedLayout=lambda vec, per_phase, max_phase, order: Swizzled(vec, per_phase, max_phase),
        SharedLinearLayout=lambda offset_bases, block_bases, alignment: Linear(tuple(map(tuple, offset_bases))),
        NVMMASharedLayout=nvmma_layout,
        static_range=lambda *bounds: range(*map(int, bounds)),
        program_id=lambda axis: Tensor(torch.tensor(here().program, dtype=torch.int32)),
        num_programs=lambda axis: Number(here().programs),
        num_warps=lambda: constant(here().warps),
        to_tensor=lambda value: Tensor(tensor(value)),
        arange=lambda start, stop, layout=None: Tensor(torch.arange(int(start), int(stop), dtype=torch.int32)),
        full=lambda shape, value, dtype, layout=None: full(shape, value, dtype),
        zeros=lambda shape, dtype, layout=None: Tensor(torch.zeros(shaped(shape), dtype=dtype)),
        load=load,
        store=lambda pointer, value, mask=None, cache_modifier="": pointer.store(value, mask),
        atomic_add=atomic_add,
        where=where,
        cdiv=lambda one, other: (one + other - 1) // other,
        zeros_like=lambda x: Tensor(torch.zeros_like(x.data)),
        associative_scan=associative_scan,
        minimum=both(torch.fmin),
        maximum=both(torch.fmax),
        fma=lambda one, other, more: one * other + more,
        exp=lambda x: Tensor(x.data.exp()),
        exp2=lambda x: Tensor(x.data.exp2()),
        log=lambda x: Tensor(x.data.log()),
        abs=lambda x: Tensor(x.data.abs()),
        rsqrt=lambda x: Tensor(x.data.rsqrt()),
        umulhi=umulhi,
        max=lambda x, axis=None: axes(x.data, maxima, axis),
        min=lambda x, axis=None: axes(x.data, minima, axis),
        sum=lambda x, axis=None: axes(x.data, sums, axis),
        reduce_or=lambda x, axis: Tensor((x.data != 0).any(axis).to(x.data.dtype)),
        reshape=lambda x, shape: Tensor(x.data.reshape(shaped(shape))),
        permute=lambda x, order: Tensor(x.data.permute(order)),
        expand_dims=lambda x, axis: Tensor(x.data.unsqueeze(axis)),
        broadcast=lambda x, y: tuple(Tensor(data) for data in torch.broadcast_tensors(x.data, y.data)),
        join=lambda x, y: Tensor(torch.stack([x.data, y.data], -1)),
        split=lambda x: tuple(Tensor(data) for data in x.data.unbind(-1)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        inline_asm_elementwise=elementwise,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
    )


def aggregate(kind: type) -> type:
    """As `megakernel.device.compat.aggregate`: the annotated fields, in their order."""

    def __init__(self: Any, *values: Any) -> None:
        for name, value in zip(kind.__annotations__, values, strict=True):
            setattr(self, name, value)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


def jit(*functions: Any, **options: Any) -> Any:
    return functions[0] if functions else lambda function: function


@contextmanager
def emulated() -> Iterator[Callable[[str], ModuleType]]:
    """Within it, what it yields imports device modules, and `megakernel.options`, that run on torch; others keep theirs."""
    gl = language()
    gluon = SimpleNamespace(jit=jit, constexpr_function=lambda function: function, language=gl)
    barriers = SimpleNamespace(init=init, expect=expect, wait=wait, MBarrierLayout=lambda: Swizzled(1, 1, 1))
    barriers.arrive = lambda memory, count=1, pred=True: barrier_of(memory).arrive(count) if pred else None
    fakes: dict[str, Any] = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gl,
        "triton.experimental.gluon.language.nvidia.hopper": SimpleNamespace(
            mma_v2=mma,
            mbarrier=barriers,
            fence_async_shared=lambda: None,
            warpgroup_mma=warpgroup_mma,
            warpgroup_mma_wait=warpgroup_mma_wait,
        ),
        f"{DEVICE}.compat": SimpleNamespace(
            aggregate=aggregate,
            barrier=lambda: None,
            reinterpret=lambda memory, dtype, shape, layout: memory.reinterpret(dtype, shape, layout),
            copy_page=copy_page,
        ),
    }
    parent = importlib.import_module("megakernel")
    known = {name: getattr(parent, name) for name in ("device", "options") if hasattr(parent, name)}
    with patch.dict(sys.modules, fakes):
        for name in list(sys.modules):
            if (name == DEVICE or name.startswith(f"{DEVICE}.") or name == "megakernel.options") and name not in fakes:
                del sys.modules[name]

        def made(name: str) -> ModuleType:
            """A module, whose loops count scalars."""
            found = importlib.import_module(name)
            for each in [module for path, module in sys.modules.items() if path.startswith(f"{DEVICE}.")]:
                if isinstance(each, ModuleType):
                    vars(each)["range"] = counted
            return found

        try:
            yield made
        finally:
            for name, module in known.items():
                setattr(parent, name, module)
