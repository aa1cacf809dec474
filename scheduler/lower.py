"""Lowering: one decode token of a model as a list of instructions in program order.

Program order is the meaning of the program: a read sees the latest earlier write, or, where there is none, the previous
token's.  Who runs an instruction, and when, is decided later.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from instructions.attention import Attention
from instructions.base import Instruction
from instructions.choose import Choose
from instructions.combine import Combine
from instructions.down import Down
from instructions.embed import Embed
from instructions.expert_down import ExpertDown
from instructions.expert_gate_up import ExpertGateUp
from instructions.gate_up import GateUp
from instructions.hand_over import HandOver
from instructions.lm_head import LmHead
from instructions.matvec import RowBlocks
from instructions.o_proj import OProj
from instructions.qkv import Qkv
from instructions.router import Router
from instructions.sample import Sample
from instructions.shape import Shape, ceil_div

OF_LAYERS = (Qkv, OProj, GateUp, Down, Router, ExpertGateUp, ExpertDown)
BY_MATRIX: dict[str, type[RowBlocks]] = {kind.MATRIX: kind for kind in OF_LAYERS}


def split_blocks(parts: Sequence[int], sms: int) -> Iterator[tuple[int, int]]:
    """Split row blocks into runs (first block, blocks) for `sms` SMs, as evenly as can be, none across a part's edge.

    `parts` are the consecutive part sizes.  There are at most `sms` runs unless the edges alone ask for more, and no run
    is longer than an even share rounded up.
    """
    share = ceil_div(sum(parts), sms)
    runs = [ceil_div(part, share) for part in parts]
    longest = [(-ceil_div(part, count), i) for i, (part, count) in enumerate(zip(parts, runs, strict=True))]
    heapq.heapify(longest)
    for _ in range(min(sms, sum(parts)) - sum(runs)):
        _, i = longest[0]
        runs[i] += 1
        heapq.heapreplace(longest, (-ceil_div(parts[i], runs[i]), i))
    base = 0
    for part, count in zip(parts, runs, strict=True):
        edges = [base + part * r // count for r in range(count + 1)]
        yield from ((start, stop - start) for start, stop in zip(edges, edges[1:], strict=False))
        base += part


def runs(kind: type[RowBlocks], shape: Shape, layer: int, sms: int) -> Iterator[tuple[int, int]]:
    """The matrix of `kind` in runs (first block, blocks) for `sms` SMs."""
    return split_blocks(kind.parts(shape, layer), sms)


def lower_attention(shape: Shape, layer: int) -> Iterator[Instruction]:
    """Attention of one layer, in slices, and what joins them."""
    heads = range(shape.config.num_kv_heads)
    for column in range(0, shape.columns, shape.attention_width):
        for index in range(shape.slices):
            yield from (Attention(layer, head, index, column) for head in heads)
    if shape.slices > 1:
        yield from (Combine(layer, head, column) for column in range(shape.columns) for head in heads)


def lower_layer(shape: Shape, layer: int, sms: int) -> Iterator[Instruction]:
    """One transformer layer: its linears in their order, and attention before the one that multiplies its output."""
    for linear in shape.tape.layer.linears:
        if linear.source == "attention":
            yield from lower_attention(shape, layer)
        kind = BY_MATRIX[linear.kind]
        yield from (kind(layer, *run) for run in runs(kind, shape, layer, sms))
        if kind is Router:
            yield Choose(layer)


def lower(shape: Shape, sms: int) -> list[Instruction]:
    """The whole token, or what prefill leaves of a prompt's last one, in program order."""
    program: list[Instruction] = [HandOver(shape.first_layer) if shape.tail else Embed(0)]
    for layer in range(shape.first_layer, shape.config.num_layers):
        program.extend(lower_layer(shape, layer, sms))
    heads = [LmHead(0, *run, slot) for slot, run in enumerate(runs(LmHead, shape, 0, sms))]
    return [*program, *heads, Sample(0, len(heads))]
