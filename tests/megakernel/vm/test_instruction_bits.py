"""The arithmetic of an instruction gives the same bits however its rows are split into runs: the schedule decides the runs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from instructions.gate_up import swiglu
from instructions.matvec import row_blocks
from instructions.shape import HELD_PAGES, Shape
from models.tape import BLOCK_ROWS
from tests.support.vm_models import TINY

SHAPE = Shape(TINY, 2, 64, 64, 1)


def test_swiglu_of_a_slice_is_the_slice_of_swiglu() -> None:
    """torch's sigmoid has two implementations, one for whole vectors and one for what is left over."""
    gate, up = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    whole = swiglu(gate, up)
    torch.testing.assert_close(whole, torch.nn.functional.silu(gate) * up, rtol=1e-6, atol=0)
    for start, stop in itertools.product(range(0, 300, 8), range(8, 308, 8)):
        if start < stop:
            assert torch.equal(swiglu(gate[start:stop], up[start:stop]), whole[start:stop]), (start, stop)


def product(pages: torch.Tensor, x: torch.Tensor, blocks: int, pages_per_block: int) -> torch.Tensor:
    """Drive `row_blocks` over pages [blocks * pages_per_block, page elements] as a machine does."""
    steps = row_blocks(SimpleNamespace(shape=SHAPE), x, blocks, pages_per_block)
    taken, request = 0, next(steps)
    while True:
        assert request.first == taken and 1 <= request.count <= HELD_PAGES, "in order, no more than may be held"
        taken += request.count
        try:
            request = steps.send(pages[request.first : taken])
        except StopIteration as end:
            assert taken == len(pages)
            return end.value


@pytest.mark.parametrize("pages_per_block", [1, 2, 3, 4, 5, 9])
def test_row_blocks_of_a_run_are_those_of_the_whole(pages_per_block: int) -> None:
    blocks, generator = 7, torch.Generator().manual_seed(pages_per_block)
    weights = torch.randn(blocks * pages_per_block, SHAPE.page_elements, generator=generator).bfloat16()
    x = torch.randn(pages_per_block * SHAPE.page_columns, generator=generator).bfloat16().float()
    whole = product(weights, x, blocks, pages_per_block)
    matrix = weights.view(blocks, -1, BLOCK_ROWS, SHAPE.tile_columns).transpose(1, 2).reshape(blocks * BLOCK_ROWS, -1)
    exact = (matrix.double() @ x.double()).view(blocks, BLOCK_ROWS)
    # An fp32 sum of K products is within K * eps / 2 of exact, relative to the sum of their magnitudes.
    bound = x.numel() * 2**-24 * (matrix.double().abs() @ x.double().abs()).view(blocks, BLOCK_ROWS)
    assert ((whole.double() - exact).abs() <= bound).all()
    for start, stop in itertools.combinations(range(blocks + 1), 2):
        part = weights[start * pages_per_block : stop * pages_per_block]
        assert torch.equal(product(part, x, stop - start, pages_per_block), whole[start:stop]), (start, stop)
