"""The grouped product on a CPU, and all that it refuses, in one line each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakernel.grouped.product import grouped_product
from megakernel.grouped.reference import grouped_reference
from megakernel.grouped.tiling import Plan
from models.errors import UserError


def problem(counts: list[int], n: int = 48, k: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(counts))
    x = torch.randn(sum(counts), k, generator=generator).bfloat16()
    w = torch.randn(len(counts), n, k, generator=generator).bfloat16()
    return x, w, torch.tensor(counts).cumsum(0).int()


@pytest.mark.parametrize("counts", [[3, 0, 1, 17], [0, 0], [5]])
def test_rows_meet_their_group_s_matrix(counts: list[int]) -> None:
    x, w, offsets = problem(counts)
    y = grouped_product(x, w, offsets)
    assert y.dtype == torch.bfloat16 and y.shape == (sum(counts), 48)
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    wanted = [(w[group].double() @ x[row].double()).float() for row, group in enumerate(groups)]
    for row, values in enumerate(wanted):
        torch.testing.assert_close(grouped_reference(x, w, offsets)[row], values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y[row].float(), values, rtol=2**-8, atol=1e-5)


def test_rows_beyond_the_last_group_stay() -> None:
    x, w, offsets = problem([4, 4, 4])
    out = torch.full((12, 48), -7.0, dtype=torch.bfloat16)
    assert grouped_product(x, w, offsets - 2, out) is out
    assert (out[10:] == -7).all() and not (out[:10] == -7).any()


def test_scales_multiply_rows_of_both() -> None:
    x, w, offsets = problem([3, 0, 2])
    x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    scales = torch.rand(5) + 0.5, torch.rand(3, 48) + 0.5
    y = grouped_product(x, w, offsets, scales=scales)
    for row, group in enumerate([0, 0, 0, 2, 2]):
        wanted = (w[group].double() @ x[row].double()) * scales[0][row] * scales[1][group]
        torch.testing.assert_close(y[row].double(), wanted, rtol=2**-8, atol=1e-5)


def refused(**changes: Any) -> str:
    x, w, offsets = problem([4, 4])
    arguments: dict[str, Any] = {"x": x, "w": w, "offsets": offsets, **changes}
    with pytest.raises(UserError) as caught:
        grouped_product(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


BYTES = {"x": e4m3(8, 32), "w": e4m3(2, 48, 32)}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "x of one dimension": ({"x": bf16(8)}, "x has the shape [8]: give x [rows, K]"),
    "w of two": ({"w": bf16(48, 32)}, "w has the shape [48, 32]"),
    "fp16": ({"x": torch.zeros(8, 32, dtype=torch.float16)}, "x is torch.float16: give it as torch.bfloat16"),
    "long offsets": ({"offsets": torch.tensor([4, 8])}, "offsets is torch.int64: give it as torch.int32"),
    "another device": ({"offsets": torch.empty(2, dtype=torch.int32, device="meta")}, "offsets is on meta and x on cpu"),
    "K": ({"x": bf16(8, 48)}, "x [8, 48] has 48 columns and w [2, 48, 32] has 32"),
    "offsets": ({"offsets": torch.tensor([0, 4, 8], dtype=torch.int32)}, "there are 3 offsets for 2 groups"),
    "K of no multiple": ({"x": bf16(8, 40), "w": bf16(2, 48, 40)}, "has K = 40: use a multiple of 16"),
    "N of no multiple": ({"w": bf16(2, 24, 32)}, "has N = 24: use a multiple of 16"),
    "no K": ({"x": bf16(8, 0), "w": bf16(2, 48, 0)}, "has K = 0: use a multiple of 16"),
    "no groups": ({"w": bf16(0, 48, 32), "offsets": torch.zeros(0, dtype=torch.int32)}, "w has 0 groups: use 1 to 1024"),
    "many groups": (
        {"w": bf16(1025, 16, 16), "x": bf16(8, 16), "offsets": torch.zeros(1025, dtype=torch.int32)},
        "w has 1025 groups: use 1 to 1024",
    ),
    "transposed": ({"w": bf16(2, 32, 48).transpose(1, 2)}, "w is not contiguous"),
    "not aligned": ({"x": bf16(257)[1:].view(8, 32)}, "x is not contiguous from a multiple of 16 bytes on"),
    "out": ({"out": bf16(8, 32)}, "out has the shape [8, 32]: give [8, 48]"),
    "fp32 out": ({"out": torch.zeros(8, 48)}, "out is torch.float32: give it as torch.bfloat16"),
    "e4m3 without scales": (BYTES, "x is torch.float8_e4m3fn and there are no scales"),
    "bf16 with scales": ({"scales": (torch.ones(8), torch.ones(2, 48))}, "and there are scales: give them with torch.float8"),
    "e4m3 and bf16": ({"x": e4m3(8, 32), "scales": (torch.ones(8), torch.ones(2, 48))}, "w is torch.bfloat16: give it as"),
    "scales": ({**BYTES, "scales": (torch.ones(8), torch.ones(48, 2))}, "scales have the shapes [8], [48, 2]: give [8]"),
    "bf16 scales": ({**BYTES, "scales": (bf16(8), torch.ones(2, 48))}, "the scale of x is torch.bfloat16"),
    "no SM": ({"plan": Plan(0)}, "cannot be launched: use at least 1 SM"),
    "no band": ({"plan": Plan(1, band=0)}, "a band of at least 1"),
    "slots": ({"plan": Plan(1, slots=5)}, "2 to 4 slots"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(case: str) -> None:
    changes, wanted = CASES[case]
    assert wanted in refused(**changes)


def test_no_rows() -> None:
    x, w, offsets = problem([0, 0])
    assert grouped_product(x, w, offsets).shape == (0, 48)
