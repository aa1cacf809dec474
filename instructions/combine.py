"""Combination of attention slices, for the query group of one KV head.

    M = max_s m_s,   attn = sum_s exp(m_s - M) o_s / sum_s exp(m_s - M) l_s

The slices are summed in order of their index, so the result does not depend on which finished first.  An empty slice has
m = -inf and weight 0; the last slice always holds the current position, so M is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.dimensions import Dimensions


@dataclass(frozen=True)
class Combine(Instruction):
    """All slices of KV head `head` in column `column`; only in programs with more than one slice."""

    OPCODE = 4
    MNEMONIC = "combine"
    LAYERED, SHORT = True, True

    head: int
    column: int = 0

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {"head": (0, shape.config.num_kv_heads - 1), "column": (0, shape.columns - 1)}

    def columns(self, shape: Dimensions) -> range:
        return range(self.column, self.column + 1)

    def misfit(self, shape: Dimensions) -> str | None:
        return "combines slices in a program whose attention has one slice" if shape.slices == 1 else None

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        rows, place = shape.slices * shape.partial_rows, self.column * shape.config.num_kv_heads + self.head
        return (Region("partial", self.layer, place * rows, (place + 1) * rows),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        rows, first = shape.group_rows, self.column * shape.query_rows
        return (Region("attn", self.layer, first + self.head * rows, first + (self.head + 1) * rows),)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        return Cost(0, 2 * shape.slices * shape.partial_rows)

    def execute(self, machine: Machine) -> Pages:
        shape, group = machine.shape, machine.shape.config.group
        partial = machine.read(self.reads(shape)[0]).view(shape.slices, shape.partial_rows)
        m, sums = partial[:, :group], partial[:, group : 2 * group]  # [slices, group]
        o = partial[:, 2 * group :].view(shape.slices, group, shape.head_rows)
        weight = torch.exp(m - m.amax(0))
        out, total = torch.zeros(group, shape.head_rows), torch.zeros(group)
        for s in range(shape.slices):
            out += weight[s, :, None] * o[s]
            total += weight[s] * sums[s]
        machine.write(self.writes(shape)[0], (out / total[:, None]).flatten())
        yield from ()
