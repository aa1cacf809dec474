"""The launches of a layer's mixture of experts: from the router's scores to the next layer's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from instructions.dimensions import ceil_div
from megakernel.device.grouped.product import BOX, SMALL_BOX
from megakernel.device.prefill.experts import read_experts
from megakernel.device.prefill.gathering import read_rows, read_sum
from megakernel.device.prefill.routing import read_choice, read_places
from megakernel.device.prefill.widening import widen_experts
from megakernel.gpu.machine import GpuState
from megakernel.grouped.tiling import TILE_ROWS
from megakernel.options import BOX_LAYOUT, TMA_LAYOUT, Sizes
from megakernel.prefill.launch import ROW_BLOCKS, WIDENERS, Launch
from megakernel.prefill.plan import EXPERT_KINDS, Plan, padded
from megakernel.prefill.tiling import ROUTED, STEP
from models.tape import BLOCK_ROWS, TILES_PER_PAGE


class Mixture:
    """`tensors` are a chunk's, see `Plan.tensors`; `words` its start and number of tokens."""

    def __init__(
        self, state: GpuState, sizes: Sizes, plan: Plan, tensors: Mapping[str, torch.Tensor], words: torch.Tensor
    ) -> None:
        self.state, self.sizes, self.plan, self.tensors, self.words = state, sizes, plan, tensors, words
        self.row_sizes = Sizes(plan.embedding)
        self.box = cache(self._box)

    def launches(self, size: int, layer: int, norm: int) -> Iterator[Launch]:
        """A layer's, for a chunk of up to `size` tokens whose scores are there; `norm` is where the weights of the next layer's
        norm begin."""
        yield self.choice(size)
        yield self.places(size)
        yield self.rows(size, layer)
        for kind in EXPERT_KINDS:
            if self.plan.widened:
                yield self.widening(kind, layer)
            yield self.product(kind, layer)
        yield self.sum(size, norm)

    def choice(self, size: int) -> Launch:
        """Which experts every token takes."""
        found = self.tensors
        arguments = (self.words, found["scores"], found["slots"], found["shares"], found["counts"], self.sizes)
        return Launch(read_choice, ceil_div(size, ROUTED), arguments)

    def places(self, size: int) -> Launch:
        """Where their rows go."""
        found = self.tensors
        arguments = (self.words, found["slots"], found["counts"], found["places"], found["ends"], self.sizes)
        return Launch(read_places, ceil_div(size, ROUTED), arguments)

    def rows(self, size: int, layer: int) -> Launch:
        """The rows themselves."""
        found, tape = self.tensors, self.plan.tape
        memory = (self.words, found["residual"], found["squares"], self.state.constants, found["places"], found["shares"])
        norm = tape.norm_offset(tape.norm_before("router"), layer)
        arguments = (*memory, found["rows"], found["row_shares"], norm, self.sizes, self.row_sizes)
        return Launch(read_rows, min(size, ROW_BLOCKS * self.plan.sms), arguments)

    def widening(self, kind: str, layer: int) -> Launch:
        """The matrices of a kind of a layer's experts that have rows, as bf16, in the buffer from which their product reads."""
        plan, found, matrix = self.plan, self.tensors, self.plan.tape.matrix(kind, layer)
        memory = (self.state.weights.view(torch.int32), self.state.constants, found["widened"], found["ends"])
        numbers = (matrix.first_page, matrix.scale_offset, matrix.pages, plan.config.num_experts)
        return Launch(widen_experts, WIDENERS * plan.sms, (*memory, *numbers, Sizes(plan.widening(kind))))

    def product(self, kind: str, layer: int) -> Launch:
        """The rows times their experts' matrices of a kind."""
        plan, found, matrix = self.plan, self.tensors, self.plan.tape.matrix(kind, layer)
        x, y = ("rows", "units") if kind == "expert_gate_up" else ("units", "outputs")
        operands = (self.box(x, BOX.value), self.box(x, SMALL_BOX.value), self.weight_box(kind, layer))
        numbers = (plan.config.num_experts, len(found[x]), matrix.rows, padded(matrix.columns), found[y].shape[1])
        memory = (*operands, found["ends"], found["row_shares"], found[y])
        arguments = (*memory, *numbers, plan.grouped.band, Sizes(plan.grouped_tiling(kind)))
        return Launch(read_experts, plan.sms, arguments)

    def sum(self, size: int, norm: int) -> Launch:
        """What the experts made of a token, added to its residual stream."""
        found = self.tensors
        memory = (self.words, found["outputs"], found["places"], self.state.constants)
        arguments = (*memory, found["residual"], found["normed"], found["squares"], norm, self.sizes, self.row_sizes)
        return Launch(read_sum, min(size, ROW_BLOCKS * self.plan.sms), arguments)

    def _box(self, what: str, height: int) -> TensorDescriptor:
        """A tensor map of a product's input, by boxes of `height` rows and a step along K."""
        return TensorDescriptor.from_tensor(self.tensors[what], [height, STEP], TMA_LAYOUT)

    def weight_box(self, kind: str, layer: int) -> TensorDescriptor:
        """The matrices of a kind of all of a layer's experts, [1, block, line, column], by boxes of a tile's rows; of quantised
        ones what they were widened to."""
        plan, matrix = self.plan, self.plan.tape.matrix(kind, layer)
        blocks, box = plan.config.num_experts * matrix.blocks, [1, TILE_ROWS // BLOCK_ROWS, BLOCK_ROWS, STEP]
        if plan.widened:
            first, tiles = self.tensors["widened"], ceil_div(matrix.columns, STEP)
        else:
            first, tiles = self.state.weights[matrix.first_page :].view(-1), matrix.pages_per_block * TILES_PER_PAGE
        lines = tiles * BLOCK_ROWS
        strides = [blocks * lines * STEP, lines * STEP, STEP, 1]
        return TensorDescriptor(first, [1, blocks, lines, STEP], strides, box, BOX_LAYOUT)
