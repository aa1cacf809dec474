"""What a skinny product takes and refuses, each in one line, and its reference; on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakernel.gemm.gemm import skinny_gemm
from megakernel.gemm.operands import FP8, find_problem
from megakernel.gemm.plan import Problem
from megakernel.gemm.reference import skinny_gemm_ref
from models.errors import UserError


def operands(**changed: Any) -> dict[str, Any]:
    """What is taken, but for what is changed."""
    given = {
        "x": torch.ones(3, 32).to(FP8),
        "w": torch.ones(5, 32).to(FP8),
        "w_scale": torch.ones(5),
        "x_scale": torch.ones(3),
        "out": torch.empty(3, 5, dtype=torch.bfloat16),
    }
    return given | changed


def test_what_is_taken() -> None:
    assert find_problem(**operands()) == Problem(3, 5, 32)
    wide = operands(x=torch.ones(3, 32, dtype=torch.bfloat16), x_scale=None)
    assert find_problem(**wide) == Problem(3, 5, 32, wide=True)
    apart = torch.ones(3, 48).to(FP8)[:, :32]
    assert find_problem(**operands(x=apart)) == Problem(3, 5, 32)
    single = torch.ones(7, 1, 32).to(FP8)[:, 0][2:3]
    assert find_problem(**operands(x=single, x_scale=torch.ones(1), out=None)) == Problem(1, 5, 32)


HALF = torch.bfloat16
REFUSED = [
    ({"x": torch.ones(32).to(FP8)}, "x has 1 dimensions: it must have two"),
    ({"w": torch.ones(5, 32)}, "W is torch.float32: it must be torch.float8_e4m3fn"),
    ({"w": torch.ones(5, 32).to(torch.float8_e5m2)}, "W is torch.float8_e5m2"),
    ({"x": torch.ones(3, 32, dtype=torch.float16)}, "x is torch.float16: it must be"),
    ({"x": torch.ones(3, 48).to(FP8)}, "x has 48 columns and W 32"),
    ({"x": torch.ones(3, 32, dtype=HALF)}, "x in bf16 takes no x_scale"),
    ({"x_scale": None}, "x in FP8 needs an x_scale"),
    ({"x": torch.ones(0, 32).to(FP8)}, "0 tokens: a skinny product takes 1 to 64"),
    ({"x": torch.ones(65, 32).to(FP8)}, "65 tokens: a skinny product takes 1 to 64"),
    ({"x": torch.ones(3, 24).to(FP8), "w": torch.ones(5, 24).to(FP8)}, "24 columns: TMA takes a multiple of 16"),
    ({"w_scale": torch.ones(4)}, r"w_scale is torch.float32 \[4\]: it must be torch.float32 \[5\], contiguous"),
    ({"w_scale": torch.ones(5, dtype=HALF)}, "w_scale is torch.bfloat16"),
    ({"x_scale": torch.ones(6)[::2]}, r"x_scale is torch.float32 \[3\]: it must be"),
    ({"x": torch.ones(3, 40).to(FP8)[:, :32]}, "x has strides (.*): rows must be contiguous, a multiple of 16 bytes apart"),
    ({"w": torch.ones(32, 5).to(FP8).T}, "W has strides (.*): rows must be contiguous"),
    ({"x": torch.ones(3, 48).to(FP8)[:, 8:40]}, "x does not begin at a multiple of 16 bytes: clone it"),
    ({"out": torch.empty(3, 5)}, r"out is torch.float32 \[3, 5\]: it must be torch.bfloat16 \[3, 5\], contiguous"),
    ({"out": torch.empty(5, 3, dtype=HALF).T}, "out is torch.bfloat16"),
    ({"w_scale": torch.ones(5, device="meta")}, "w_scale is on meta, x on cpu: move them to one device"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "complaint"), REFUSED, ids=[complaint for _, complaint in REFUSED])
def test_what_is_refused(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        find_problem(**operands(**changed))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=complaint):
        skinny_gemm(**operands(**changed))


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(
        UserError, match="the operands are on cpu: the kernel needs a Hopper GPU; skinny_gemm_ref runs anywhere"
    ):
        skinny_gemm(**operands())


@pytest.mark.parametrize("wide", [False, True])
def test_the_reference_is_the_formula(wide: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, 32, generator=generator) for rows in (3, 5))
    w_scale, x_scale = torch.rand(5, generator=generator) + 0.5, torch.rand(3, generator=generator) + 0.5
    narrow, w = x.bfloat16() if wide else x.to(FP8), w.to(FP8)
    y = skinny_gemm_ref(narrow, w, w_scale, None if wide else x_scale)
    for m in range(3):
        for n in range(5):
            total = sum(float(narrow[m, k]) * float(w[n, k]) for k in range(32)) * float(w_scale[n])
            assert float(y[m, n]) == pytest.approx(total if wide else total * float(x_scale[m]), rel=2**-8)
