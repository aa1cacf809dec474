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

A sequence may have several columns, each the next position: then a slice's pages serve as many of them as share a matrix
instruction.  The positions of the columns before one are among those that it attends to, but not in the cache yet: their rows
stand in new_kv, and take the places in the page that they will have.  So a token's numbers are the same in whichever column it
is computed.  Where the page plan lets a loader run ahead into the next step, it must know where that begins: it reads the
token, as `Embed` does.

Of several sequences each is split as it would be alone: the program's slices beyond those stay empty, so that a sequence's
numbers do not depend on how long the others are.

The slices share the pages that exist evenly, so every slice works at any position within the bucket; page uses that a slice
does not need pass through the ring empty, which keeps the page plan the same for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from instructions.base import Activation, Cost, Instruction, Machine, PageRequest, Pages, PageSource, Region
from instructions.dimensions import Dimensions
from instructions.matvec import DTYPES
from models.tape import PAGE_BYTES


@dataclass(frozen=True)
class Attention(Instruction):
    """KV head `head`, slice `slice` of the program's slices, columns from `column` on (`Dimensions.attention_width`)."""

    OPCODE = 3
    MNEMONIC = "attention"
    LAYERED, SHORT = True, True
    BRINGS = (
        Activation("partial", lambda shape: shape.all_partial_rows, sliced=True, apart=True),
        Activation("attn", lambda shape: shape.query_rows, apart=True),
    )

    head: int
    slice: int
    column: int = 0

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        heads, slices = shape.config.num_kv_heads, shape.slices
        return {"head": (0, heads - 1), "slice": (0, slices - 1), "column": (0, shape.columns - shape.attention_width)}

    def columns(self, shape: Dimensions) -> range:
        return range(self.column, self.column + shape.attention_width)

    def sequence(self, shape: Dimensions) -> int:
        """Whose columns they are."""
        return self.column // shape.depth

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
        first = self.sequence(shape) * shape.new_rows + self.head * kv_rows
        rows = Region("kv", self.layer, first, first + kv_rows)
        return (rows,) if shape.columns == 1 else (rows, Region("token", 0, 0, 1))

    def output(self, shape: Dimensions, column: int) -> Region:
        """Where a column's output goes, or what `Combine` needs of it."""
        if shape.slices == 1:
            rows, first = shape.group_rows, column * shape.query_rows
            return Region("attn", self.layer, first + self.head * rows, first + (self.head + 1) * rows)
        first = ((column * shape.config.num_kv_heads + self.head) * shape.slices + self.slice) * shape.partial_rows
        return Region("partial", self.layer, first, first + shape.partial_rows)

    def cached(self, shape: Dimensions) -> tuple[Region, ...]:
        """The rows of the cache that it writes, where any."""
        if not shape.head_norms or self.slice < shape.slices - 1:
            return ()
        first = self.sequence(shape) * shape.new_rows + self.head * 2 * shape.head_rows
        return (Region("kv", self.layer, first, first + shape.head_rows),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (*(self.output(shape, column) for column in self.columns(shape)), *self.cached(shape))

    def page_uses(self, shape: Dimensions) -> int:
        return 2 * shape.slice_pages

    def tape_page(self, shape: Dimensions) -> int:
        return shape.cache_page(self.layer, self.head, 0, self.sequence(shape))

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
        if shape.head_norms:
            q = q * self.head_factors(machine, machine.column)[:-1, None]
        q, (new_k, new_v) = q.to(dtype).float(), self.current(machine, machine.column)
        every = shape.columns_of(self.sequence(shape))
        before = [self.current(machine, every[place]) for place in range(machine.past - machine.cached)]
        state = OnlineSoftmax(config.group, dp, config.attention_scale)
        first, stop = replace(shape, slices=machine.slices).slice_range(self.slice, machine.past)
        for i in range(shape.slice_pages):
            k_page, v_page = (yield PageRequest(2 * i, 2)).unbind(0)
            page = first + i
            if page < stop:
                k, v = (cache_rows(pages, shape) for pages in (k_page, v_page))
                for position, rows in enumerate(before, machine.cached - page * shape.page_positions):
                    if 0 <= position < shape.page_positions:
                        k[position], v[position] = (row.to(dtype).float() for row in rows)
                count = min(machine.past - page * shape.page_positions, shape.page_positions)
                state.add(q, k[:count], v[:count], dtype)
        if self.slice == machine.slices - 1:
            state.add(q, new_k[None].to(dtype).float(), new_v[None].to(dtype).float(), dtype)
        machine.write(self.output(shape, machine.column), state.normalised() if shape.slices == 1 else state.partial())
        for region in self.cached(shape):
            machine.write(region, new_k)

    def current(self, machine: Machine, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The key and the value of a column's own position, [dp] each."""
        rows = 2 * machine.shape.head_rows
        own = Region("new_kv", self.layer, self.head * rows, (self.head + 1) * rows)
        k, v = machine.read_column(own, column).view(2, -1).unbind(0)
        return (k * self.head_factors(machine, column)[-1] if machine.shape.head_norms else k), v

    def head_factors(self, machine: Machine, column: int) -> torch.Tensor:
        """1 / sqrt(mean y^2 + eps) of each of the group's query heads and, last, of its key head, of a column, [group + 1]; of
        all queries and all keys where these are normed together."""
        config = machine.shape.config
        squares = machine.read_column(self.reads(machine.shape)[2], column)
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
