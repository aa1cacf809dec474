"""A skinny product on the GPU: close to fp64, the same bits every time, whatever the shape, the plan and the number of SMs."""

from __future__ import annotations

import pytest
import torch

from megakernel.gemm.gemm import Workspace, multiprocessors, skinny_gemm
from megakernel.gemm.operands import FP8
from megakernel.gemm.plan import Plan, Problem, choose_plan, make_plan
from megakernel.gemm.reference import skinny_gemm_ref
from models.errors import UserError

pytestmark = pytest.mark.gpu

SHAPES = [(1, 16), (63, 16), (64, 128), (65, 144), (200, 1040), (512, 4112), (1000, 8192), (8192, 2048), (10240, 528)]
TOKENS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 63, 64]
BF16 = 2.0**-8  # half a unit in the last place, of a number's size
# The tensor cores cut the sum of a few FP8 products to 13 bits below the greatest: each of a step's 512 columns by 32 may lose
# that much of the greatest partial sum, which is no greater than the sum of the products' magnitudes.
FP8_SUM, BF16_SUM = 16 * 2.0**-13, 2.0**-20


def operands(tokens: int, rows: int, columns: int, wide: bool, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, W, W's scales and x's, on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    w, x = (4 * normal(rows, columns)).to(FP8), normal(tokens, columns)
    scales = [torch.rand(length, generator=generator, device="cuda") + 0.5 for length in (rows, tokens)]
    return (x.bfloat16(), w, scales[0]) if wide else (x.to(FP8), w, scales[0], scales[1])


def assert_close(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *scales: torch.Tensor) -> None:
    """Within the rounding of the result and of the sums."""
    wanted = skinny_gemm_ref(x, w, *scales).double()
    sizes = skinny_gemm_ref(x.double().abs().to(x.dtype), w.double().abs().to(w.dtype), *scales).double()
    bound = 2 * BF16 * wanted.abs() + (FP8_SUM if len(scales) == 2 else BF16_SUM) * sizes + 1e-30
    error = (found.double() - wanted).abs()
    assert (error <= bound).all(), f"wrong by up to {(error / bound).max()} times the bound"


@pytest.mark.parametrize("wide", [False, True], ids=["fp8", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_fp64(shape: tuple[int, int], wide: bool) -> None:
    for tokens in TOKENS:
        given = operands(tokens, *shape, wide, seed=tokens)
        assert_close(skinny_gemm(*given), *given)


@pytest.mark.parametrize("wide", [False, True], ids=["fp8", "bf16"])
@pytest.mark.parametrize("sms", [1, 7, 78, 114, 132, 144])
def test_any_number_of_thread_blocks(sms: int, wide: bool) -> None:
    for tokens in (5, 16, 30, 64):
        problem = Problem(tokens, 1345, 4112, wide)
        given = operands(tokens, 1345, 4112, wide)
        for plan in (choose_plan(problem, sms), make_plan(problem, 1, 2, sms), make_plan(problem, 4, 1, sms)):
            assert_close(skinny_gemm(*given, plan=plan), *given)


@pytest.mark.parametrize("wide", [False, True], ids=["fp8", "bf16"])
@pytest.mark.parametrize("early", [False, True])
def test_the_same_bits_in_every_run(wide: bool, early: bool) -> None:
    """Back to back on one workspace, so that launches meet each other's parts and counters."""
    for tokens in (1, 16, 64):
        given = operands(tokens, 5000, 4096, wide)
        plan = make_plan(Problem(tokens, 5000, 4096, wide), 2, 1, multiprocessors(given[0].device), 2 if early else 1)
        workspace = Workspace(plan, given[0].device)
        first = skinny_gemm(*given, plan=plan, workspace=workspace)
        outs = [torch.empty_like(first) for _ in range(100)]
        for out in outs:
            skinny_gemm(*given, plan=plan, workspace=workspace, out=out, early=early)
        assert all(torch.equal(first, out) for out in outs)
        assert not workspace.arrivals.any(), "counters are left at zero"


def test_an_early_kernel_waits_for_what_the_one_before_writes() -> None:
    """x and its scales come from the kernel before; the counters and parts are shared with it."""
    x, w, w_scale, x_scale = operands(16, 8192, 8192, False)
    other = operands(16, 8192, 8192, False, seed=1)[0]
    wanted = [skinny_gemm(each, w, w_scale, x_scale) for each in (x, other)]
    held = torch.empty_like(x)
    found = []
    for turn in range(50):
        held.copy_((x, other)[turn % 2])
        found.append(skinny_gemm(held, w, w_scale, x_scale, early=True))
    assert all(torch.equal(each, wanted[turn % 2]) for turn, each in enumerate(found))


@pytest.mark.parametrize("wide", [False, True], ids=["fp8", "bf16"])
@pytest.mark.parametrize("tokens", [3, 64])
def test_numbers_that_are_none_spread_to_their_row_and_column_alone(tokens: int, wide: bool) -> None:
    given = list(operands(tokens, 300, 1040, wide))
    clean = skinny_gemm(*given)
    given[0][1, 700] = float("nan")
    given[1][257, 33] = float("nan")
    spoilt = skinny_gemm(*given)
    nan = torch.zeros_like(spoilt, dtype=torch.bool)
    nan[1], nan[:, 257] = True, True
    assert torch.equal(spoilt.isnan(), nan)
    assert torch.equal(spoilt[~nan], clean[~nan])


def test_infinite_tokens_give_infinite_results() -> None:
    x, w, w_scale = operands(4, 300, 1040, True)
    x[2, 5] = float("inf")
    found = skinny_gemm(x, w, w_scale)
    wanted = skinny_gemm_ref(x, w, w_scale)
    assert torch.equal(found.isinf(), wanted.isinf()) and torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[2][found[2].isinf()], wanted[2][wanted[2].isinf()])


def test_rows_further_apart_than_they_are_long() -> None:
    x, w, w_scale, x_scale = operands(9, 300, 1040, False)
    apart_x, apart_w = (torch.zeros(len(each), 2048, dtype=FP8, device="cuda")[:, :1040] for each in (x, w))
    apart_x.copy_(x), apart_w.copy_(w)
    assert torch.equal(skinny_gemm(apart_x, apart_w, w_scale, x_scale), skinny_gemm(x, w, w_scale, x_scale))


def test_in_a_graph_it_asks_for_a_workspace() -> None:
    given = operands(16, 1024, 1024, False)
    plan = choose_plan(Problem(16, 1024, 1024), multiprocessors(given[0].device))
    workspace, graph = Workspace(plan, given[0].device), torch.cuda.CUDAGraph()
    wanted = skinny_gemm(*given)
    with torch.cuda.graph(graph):
        with pytest.raises(UserError, match="pass workspace=Workspace"):
            skinny_gemm(*given)
        found = skinny_gemm(*given, workspace=workspace)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


def test_what_does_not_fit_is_refused() -> None:
    x, w, w_scale, x_scale = operands(16, 1024, 1024, False)
    small: Plan = choose_plan(Problem(1, 64, 128), 132)
    with pytest.raises(UserError, match="the plan is for"):
        skinny_gemm(x, w, w_scale, x_scale, plan=small)
    with pytest.raises(UserError, match="the workspace is too small"):
        skinny_gemm(x, w, w_scale, x_scale, workspace=Workspace(small, x.device))
    with pytest.raises(UserError, match="w_scale is on cpu, x on cuda:0"):
        skinny_gemm(x, w, w_scale.cpu(), x_scale)
