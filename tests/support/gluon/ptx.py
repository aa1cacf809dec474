"""The instructions of PTX that widen weights, on int32 tensors (NVIDIA PTX ISA)."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

FULL = 0xFFFFFFFF


def bits(words: torch.Tensor) -> torch.Tensor:
    """Registers of 32 bits as int64."""
    return words.long() & FULL


def register(numbers: torch.Tensor) -> torch.Tensor:
    """And back."""
    numbers = numbers & FULL
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)


def prmt(a: torch.Tensor, b: torch.Tensor, selector: int) -> torch.Tensor:
    both, found = a | b << 32, torch.zeros_like(a)
    for byte in range(4):
        which = selector >> 4 * byte & 0xF
        assert which < 8, "without the sign"
        found = found | (both >> 8 * which & 0xFF) << 8 * byte
    return found


def bf16_halves(a: torch.Tensor) -> torch.Tensor:
    """Of registers, exact: float64 [..., 2]."""
    return register(a)[..., None].view(torch.bfloat16).double()


def rounded(a: torch.Tensor) -> torch.Tensor:
    """fp32 bits as those of the nearest bf16."""
    return register(a).view(torch.float32).bfloat16().view(torch.int16).long() & 0xFFFF


def fma_bf16x2(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    exact = bf16_halves(a) * bf16_halves(b) + bf16_halves(c)
    rounded = exact.to(torch.bfloat16)
    assert torch.equal(rounded.double(), exact), "no weight is rounded"
    return bits(rounded.view(torch.int32)[..., 0])


def run(asm: str, inputs: list[torch.Tensor], outputs: int) -> list[torch.Tensor]:
    """What a text leaves in its first `outputs` operands; those after them are the inputs."""
    values = {f"${outputs + i}": bits(words) for i, words in enumerate(inputs)}
    for line in re.sub(r"^\s*\{|\}\s*$", "", asm).split(";"):
        if not (line := line.strip()) or line.startswith(".reg"):
            continue
        operation, rest = line.split(None, 1)
        if halves := re.fullmatch(r"\{(\w+), (\w+)\}, (\S+)", rest):
            values[halves[1]], values[halves[2]] = values[halves[3]] & 0xFFFF, values[halves[3]] >> 16
            continue
        target, *names = [name.strip() for name in rest.split(",")]
        shape = next(iter(values.values()))
        args = [values[name] if name in values else torch.full_like(shape, int(name, 0)) for name in names]
        values[target] = computed(operation, args) & FULL
    return [register(values[f"${i}"]) for i in range(outputs)]


def computed(operation: str, args: list[torch.Tensor]) -> torch.Tensor:
    """One instruction's result."""
    if operation == "lop3.b32":
        a, b, c, table = args
        assert int(table.flatten()[0]) == 0xEA
        return a & b | c
    if operation == "prmt.b32":
        return prmt(args[0], args[1], int(args[2].flatten()[0]))
    if operation == "shf.r.wrap.b32":
        low, high, by = args
        return (low | high << 32) >> by
    if operation == "cvt.f32.f16":
        return bits(args[0].to(torch.int32).to(torch.int16).view(torch.float16).float().view(torch.int32))
    simple: dict[str, Callable[..., torch.Tensor]] = {
        "and.b32": lambda a, b: a & b,
        "shl.b32": lambda a, b: a << b,
        "shr.u32": lambda a, b: a >> b,
        "mov.b32": lambda a: a,
        "fma.rn.bf16x2": fma_bf16x2,
        "setp.eq.s32": lambda a, b: (a == b).long(),
        "setp.eq.or.s32": lambda a, b, c: (a == b).long() | c,
        "cvt.rn.bf16x2.f32": lambda high, low: rounded(high) << 16 | rounded(low),
        "selp.b32": lambda a, b, c: torch.where(c != 0, a, b),
    }
    return simple[operation](*args)
