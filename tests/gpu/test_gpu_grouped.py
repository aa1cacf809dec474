"""The grouped product on a GPU: as near to fp32 as one rounding, for any group sizes; the same bits again; no stray writes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megakernel.grouped.product import grouped_product
from megakernel.grouped.reference import grouped_reference
from megakernel.grouped.tiling import WIDTHS, Plan
from models.errors import UserError

pytestmark = pytest.mark.gpu
VACANT = -7.0  # in rows that nobody may write
WIDE = [sum(width) + step for width in WIDTHS for step in (-1, 0, 1)]
SIZES: dict[str, list[int]] = {
    "zero, one, odd": [0, 1, 0, 0, 3, 17, 0, 31, 63, 65, 0],
    "both sides of every width": WIDE,
    "all in one": [0, 0, 3000, 0],
    "one row in all": [0, 0, 0, 1],
    "one group": [700],
    "many groups of few": [index % 5 for index in range(300)],
    "several tiles a group": [256 * count + step for count, step in ((1, 33), (2, 32), (3, -1), (4, 0), (2, 1))],
    "none": [0, 0, 0],
}


def problem(counts: Sequence[int], n: int, k: int, beyond: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with `beyond` rows after the last group, w and the offsets; entries of a product are of the order of one."""
    generator = torch.Generator("cuda").manual_seed(len(counts) + n + k)
    x = torch.randn(sum(counts) + beyond, k, generator=generator, device="cuda").bfloat16()
    w = (torch.randn(len(counts), n, k, generator=generator, device="cuda") / k**0.5).bfloat16()
    return x, w, torch.tensor(counts).cumsum(0).int().cuda()


def assert_near(y: torch.Tensor, wanted: torch.Tensor) -> None:
    """y is the fp32 product rounded to bf16 once: half a unit in 8 bits, and what fp32 sums in another order differ by."""
    allowed = wanted.abs() * 2.0**-8 + 1e-4
    worst = float(((y.float() - wanted).abs() - allowed).max()) if y.numel() else 0.0
    assert worst <= 0, f"{worst} more than rounding allows"


@pytest.mark.parametrize(("n", "k"), [(384, 512), (208, 80), (16, 16), (128, 1024)])
@pytest.mark.parametrize("name", SIZES)
def test_against_fp32(name: str, n: int, k: int) -> None:
    counts, beyond = SIZES[name], 37
    x, w, offsets = problem(counts, n, k, beyond)
    out = torch.full((len(x), n), VACANT, dtype=torch.bfloat16, device="cuda")
    assert grouped_product(x, w, offsets, out) is out
    torch.cuda.synchronize()
    rows = sum(counts)
    assert_near(out[:rows], grouped_reference(x, w, offsets)[:rows])
    assert (out[rows:] == VACANT).all(), "rows beyond the last group are not written"


@pytest.mark.parametrize(("n", "k"), [(384, 512), (208, 80), (1536, 2048)])
@pytest.mark.parametrize("name", ["zero, one, odd", "both sides of every width", "several tiles a group"])
def test_e4m3_with_scales(name: str, n: int, k: int) -> None:
    counts, beyond = SIZES[name], 37
    x, w, offsets = problem(counts, n, k, beyond)
    x, w = (x.float() * 8).to(torch.float8_e4m3fn), (w.float() * 8 * k**0.5).to(torch.float8_e4m3fn)
    scales = torch.rand(len(x), device="cuda") + 0.5, (torch.rand(len(counts), n, device="cuda") + 0.5) / (64 * k**0.5)
    out = torch.full((len(x), n), VACANT, dtype=torch.bfloat16, device="cuda")
    grouped_product(x, w, offsets, out, scales=scales)
    torch.cuda.synchronize()
    rows = sum(counts)
    wanted = grouped_reference(x, w, offsets, scales)[:rows]
    # besides rounding: at each of k / 32 steps what is summed, at most a few, is cut off after 13 bits, 33 terms of either sign
    allowed = wanted.abs() * 2.0**-8 + (8 + k / 32) * 4 * 2.0**-13
    assert ((out[:rows].float() - wanted).abs() <= allowed).all()
    assert float((out[:rows].float() - wanted).square().mean().sqrt()) <= 0.01
    assert (out[rows:] == VACANT).all()


@pytest.mark.parametrize("sms", [1, 7, 100])
@pytest.mark.parametrize("band", [1, 3, 8])
def test_other_orders_and_sm_counts_give_the_same_rows(sms: int, band: int) -> None:
    x, w, offsets = problem([0, 300, 1, 800, 256, 0, 513], 640, 256)
    y = grouped_product(x, w, offsets, plan=Plan(sms, band))
    assert_near(y, grouped_reference(x, w, offsets))


def test_the_same_bits_again() -> None:
    x, w, offsets = problem([120, 400, 0, 1, 255, 290, 31, 1000], 1536, 2048)
    wanted = grouped_product(x, w, offsets)
    for _ in range(20):
        assert torch.equal(grouped_product(x, w, offsets), wanted)


def test_captured_once_for_all_offsets() -> None:
    """A graph reads the offsets when it is replayed."""
    counts = ([100, 0, 412, 1], [0, 513, 0, 0], [1, 1, 1, 1])
    x, w, offsets = problem(counts[0], 256, 256)
    out = torch.empty(len(x), 256, dtype=torch.bfloat16, device="cuda")
    grouped_product(x, w, offsets, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_product(x, w, offsets, out)
    for sizes in counts:
        offsets.copy_(torch.tensor(sizes).cumsum(0).int())
        out.fill_(VACANT)
        graph.replay()
        rows = sum(sizes)
        assert_near(out[:rows], grouped_reference(x, w, offsets)[:rows])
        assert (out[rows:] == VACANT).all()


@pytest.mark.parametrize("offsets", [[-5, 40, 20, 90], [10, 2**31 - 1, 0, 64], [-(2**31), -1, 0, 0], [64, 0, 64, 0]])
def test_offsets_that_are_none_end_and_touch_nothing_else(offsets: list[int]) -> None:
    x, w, _ = problem([16, 16, 16, 16], 128, 64)
    around = torch.full((len(x) + 600, 128), VACANT, dtype=torch.bfloat16, device="cuda")
    grouped_product(x, w, torch.tensor(offsets, dtype=torch.int32, device="cuda"), around[300 : 300 + len(x)])
    torch.cuda.synchronize()
    assert (around[:300] == VACANT).all() and (around[300 + len(x) :] == VACANT).all()


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_a_large_product(tokens: int) -> None:
    """Qwen3-30B-A3B's gate and up: a sample of rows, for the whole would take long in fp32."""
    generator = torch.Generator().manual_seed(tokens)
    counts = torch.bincount(torch.randint(128, (8 * tokens,), generator=generator), minlength=128).tolist()
    x, w, offsets = problem(counts, 1536, 2048)
    y = grouped_product(x, w, offsets)
    groups = torch.repeat_interleave(torch.arange(128), torch.tensor(counts))
    for row in torch.randint(len(x), (200,), generator=generator).tolist():
        assert_near(y[row], w[int(groups[row])].float() @ x[row].float())


def test_what_is_refused_here() -> None:
    x, w, offsets = problem([3, 4], 32, 32)
    with pytest.raises(UserError, match=r"offsets is on cpu and x on cuda:0: give all on one device"):
        grouped_product(x, w, offsets.cpu())
