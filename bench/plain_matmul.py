"""A plain Triton product of FP8 operands, one output tile a program and no split along K: what a skinny one is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

CONFIGURATIONS = ((32, 256, 4, 4), (64, 128, 4, 5), (64, 256, 4, 4), (128, 128, 4, 5))  # rows of W, columns, warps, stages


@triton.jit
def plain_matmul(  # type: ignore[no-untyped-def]
    x, w, y, x_scale, w_scale, tokens, rows, columns, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y[tokens, rows] = x Wᵀ with a scale a row of each; `columns` is a multiple of COLUMNS."""
    token = tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at_x = x + token[:, None] * columns + column[None, :]
    at_w = w + row[None, :].to(tl.int64) * columns + column[:, None]
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for _ in range(0, columns, COLUMNS):
        a = tl.load(at_x, mask=token[:, None] < tokens, other=0.0)
        b = tl.load(at_w, mask=row[None, :] < rows, other=0.0)
        acc = tl.dot(a, b, acc)
        at_x += COLUMNS
        at_w += COLUMNS
    acc *= tl.load(x_scale + token, mask=token < tokens, other=0.0)[:, None]
    acc *= tl.load(w_scale + row, mask=row < rows, other=0.0)[None, :]
    known = (token[:, None] < tokens) & (row[None, :] < rows)
    tl.store(y + token[:, None].to(tl.int64) * rows + row[None, :], acc.to(tl.bfloat16), mask=known)


Launch = Callable[..., None]  # of x, w, y, x_scale, w_scale


def plain_launches(tokens: int, rows: int, columns: int) -> Iterator[tuple[str, Launch]]:
    """A launch a configuration, and its name."""
    height = max(16, 1 << (tokens - 1).bit_length())
    for tile, step, warps, stages in CONFIGURATIONS:
        if columns % step:
            continue
        options = {"num_warps": warps, "num_stages": stages}

        def launch(*operands: torch.Tensor, sizes: tuple[int, ...] = (height, tile, step), options: Any = options) -> None:
            plain_matmul[(triton.cdiv(rows, sizes[1]),)](*operands, tokens, rows, columns, *sizes, **options)

        yield f"{tile} rows by {step} columns", launch
