"""Attention of one KV head's query group over one slice of the context (flash decoding: Dao et al., 2023).

    s_t = q . k_t * scale        for the positions t of the slice; q and k in the weight type, s in fp32; scale: 1 / sqrt(d), or
                                 the model's own
    m = max s,  l = sum exp(s - m),  o = sum round(exp(s - m)) v_t

The loader streams the slice's past K and V pages through the ring, K page then V page; they hold only positions of earlier
tokens, so it need not wait for this token's QKV.  The last slice also takes the current position, from new_kv[layer], rounded
as the cache's row is; the others declare that they read it, too, so that one counter serves the whole group.  With one slice
the normalised output goes to attn[layer]; with more, each leaves (m, l, o) for `Combine`.

Where heads are normed, q and this token's k are what `Qkv` left of them: weighted and rotated, but for the factor 1 / sqrt(mean
y^2 + eps) of each head, with the row blocks' sums of y^2 beside them in squares[layer].  Each slice multiplies its queries, the
last one also this token's keys, whose cache row it writes.  Where all queries are normed together, and all keys, every slice
takes in the sums of all heads.

The slices share the pages that exist evenly, so every slice works at any position within the bucket; page uses that a slice
does not need pass through the ring empty, which keeps the page plan the same for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from instructions.base import Activation, Cost, Instruction, Machine, PageRequest, Pages, PageSource, Region
from instructions.dimensions import Dimensions
from instructions.matvec import DTYPES
from models.tape import PAGE_BYTES


@dataclass(frozen=True)
class Attention(Instruction):
    """KV head `head`, slice `slice` of the program's slices."""

    OPCODE = 3
    MNEMONIC = "attention"
    LAYERED, SHORT = True, True
    BRINGS = (
        Activation("partial", lambda shape: shape.all_partial_rows, sliced=True),
        Activation("attn", lambda shape: shape.query_rows),
    )

    head: int
    slice: int

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {"head": (0, shape.config.num_kv_heads - 1), "slice": (0, shape.slices - 1)}

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        rows, kv_rows = shape.group_rows, 2 * shape.head_rows
        query = Region("q", self.layer, self.head * rows, (self.head + 1) * rows)
        # Heads that are normed together wait for all: declared as reads of all, one counter serves all of them.
        first, stop = (0, shape.config.num_kv_heads) if shape.norms_together else (self.head, self.head + 1)
        new = Region("new_kv", self.layer, first * kv_rows, stop * kv_rows)
        count = shape.group_squares
        return (query, new, Region("squares", self.layer, first * count, stop * count)) if count else (query, new)

    def loads(self, shape: Dimensions) -> tuple[Region, ...]:
        kv_rows = 2 * shape.head_rows
        return (Region("kv", self.layer, self.head * kv_rows, (self.head + 1) * kv_rows),)

    def output(self, shape: Dimensions) -> Region:
        """Where the output goes, or what `Combine` needs of it."""
        if shape.slices == 1:
            rows = shape.group_rows
            return Region("attn", self.layer, self.head * rows, (self.head + 1) * rows)
        first = (self.head * shape.slices + self.slice) * shape.partial_rows
        return Region("partial", self.layer, first, first + shape.partial_rows)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        if not (shape.head_norms and self.takes_current(shape)):
            return (self.output(shape),)
        first = self.head * 2 * shape.head_rows
        return (self.output(shape), Region("kv", self.layer, first, first + shape.head_rows))

    def takes_current(self, shape: Dimensions) -> bool:
        """Whether this slice takes the current position."""
        return self.slice == shape.slices - 1

    def page_uses(self, shape: Dimensions) -> int:
        return 2 * shape.slice_pages

    def tape_page(self, shape: Dimensions) -> int:
        return shape.cache_page(self.layer, self.head, 0)

    def page_source(self, shape: Dimensions, tape: int, use: int, past: int, chosen: Sequence[int] = ()) -> PageSource | None:
        first, stop = shape.slice_range(self.slice, past)
        page, value = first + use // 2, use % 2
        return PageSource("kv", tape + value * shape.head_pages + page) if page < stop else None

    def cost(self, shape: Dimensions, past: int) -> Cost:
        first, stop = shape.slice_range(self.slice, past)
        pages = 2 * (stop - first)
        return Cost(pages * PAGE_BYTES, 2 * shape.config.group * pages * shape.page_elements)

    def execute(self, machine: Machine) -> Pages:
        shape, config = machine.shape, machine.shape.config
        dtype, dp = DTYPES[shape.itemsize], shape.head_rows
        q = machine.read(self.reads(shape)[0]).view(config.group, dp)
        own = Region("new_kv", self.layer, self.head * 2 * dp, (self.head + 1) * 2 * dp)
        new_k, new_v = machine.read(own).view(2, 1, dp).unbind(0)
        if shape.head_norms:
            factors = self.head_factors(machine)
            q, new_k = q * factors[:-1, None], new_k * factors[-1]
        q = q.to(dtype).float()
        state = OnlineSoftmax(config.group, dp, config.attention_scale)
        first, stop = shape.slice_range(self.slice, machine.past)
        for i in range(shape.slice_pages):
            k_page, v_page = (yield PageRequest(2 * i, 2)).unbind(0)
            page = first + i
            if page < stop:
                count = min(machine.past - page * shape.page_positions, shape.page_positions)
                k, v = (cache_rows(pages, shape)[:count] for pages in (k_page, v_page))
                state.add(q, k, v, dtype)
        if self.takes_current(shape):
            state.add(q, new_k.to(dtype).float(), new_v.to(dtype).float(), dtype)
        output, *cached = self.writes(shape)
        machine.write(output, state.normalised() if shape.slices == 1 else state.partial())
        for region in cached:
            machine.write(region, new_k.flatten())

    def head_factors(self, machine: Machine) -> torch.Tensor:
        """1 / sqrt(mean y^2 + eps) of each of the group's query heads and, last, of its key head, [group + 1]; of all queries
        and all keys where these are normed together."""
        config = machine.shape.config
        squares = machine.read(self.reads(machine.shape)[2])
        if not machine.shape.norms_together:
            return torch.rsqrt(squares.view(config.group + 1, -1).sum(1) / config.head_dim + config.rms_eps)
        of_heads = squares.view(config.num_kv_heads, config.group + 1, -1)
        queries, keys = of_heads[:, :-1].sum() / config.query_size, of_heads[:, -1].sum() / config.key_value_size
        return torch.rsqrt(torch.stack([queries] * config.group + [keys]) + config.rms_eps)


def cache_rows(page: torch.Tensor, shape: Dimensions) -> torch.Tensor:
    """One KV page as fp32 [positions, dp]."""
    tiles = page.view(shape.head_tiles, shape.page_positions, shape.tile_columns)
    return tiles.transpose(0, 1).reshape(shape.page_positions, -1)[:, : shape.head_rows].float()


class OnlineSoftmax:
    """Running softmax-weighted sum of V rows (Milakov and Gimelshein, 2018), fp32, for `group` queries."""

    def __init__(self, group: int, dp: int, scale: float) -> None:
        self.scale = scale
        self.m = torch.full((group,), -torch.inf)
        self.sum = torch.zeros(group)
        self.o = torch.zeros(group, dp)

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
        """Take in positions: q [group, dp], k and v [positions, dp], fp32; probabilities are rounded to `dtype` once."""
        s = (q @ k.T) * self.scale  # [group, positions]
        m = torch.maximum(self.m, s.amax(1))
        p, decay = torch.exp(s - m[:, None]), torch.exp(self.m - m)
        self.sum = self.sum * decay + p.sum(1)
        self.o = self.o * decay[:, None] + p.to(dtype).float() @ v
        self.m = m

    def normalised(self) -> torch.Tensor:
        """The attention output, [group * dp]."""
        return (self.o / self.sum[:, None]).flatten()

    def partial(self) -> torch.Tensor:
        """What `Combine` needs: m [group], l [group], o [group, dp], flattened."""
        return torch.cat((self.m, self.sum, self.o.flatten()))
