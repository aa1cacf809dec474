"""The chain of kernels that takes a chunk of tokens through the layers, enqueued launch by launch."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import cache

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from instructions.dimensions import ceil_div
from megakernel.device.prefill.along import read_widened
from megakernel.device.prefill.attention import read_attention
from megakernel.device.prefill.embedding import read_embedding
from megakernel.device.prefill.heads import read_heads
from megakernel.device.prefill.past import add_parts, read_past
from megakernel.device.prefill.projections import read_product
from megakernel.device.prefill.single import read_single
from megakernel.device.prefill.widening import UNITS, widen_matrix
from megakernel.gpu.machine import GpuState
from megakernel.options import BOX_LAYOUT, TMA_LAYOUT, Sizes
from megakernel.prefill.launch import ROW_BLOCKS, WIDENERS, Launch
from megakernel.prefill.mixture import Mixture
from megakernel.prefill.plan import BUFFERS, Plan
from megakernel.prefill.tiling import CONSUMER_TOKENS, STEP, AttentionTiling
from models.tape import BLOCK_ROWS, PAGE_BYTES, TILES_PER_PAGE, TapeLayout

LINES = TILES_PER_PAGE * BLOCK_ROWS  # 128-byte lines of a page
PAGE_ELEMENTS = PAGE_BYTES // 2


class Chain:
    """A chunk's buffers and the launches of each class of lengths; row i of a buffer belongs to the chunk's token i.

    `words` are the chunk's start and its number of tokens, which the kernels read: int32 [2].
    """

    def __init__(self, state: GpuState, sizes: Sizes, plan: Plan) -> None:
        self.state, self.sizes, self.plan = state, sizes, plan
        device = state.device
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in plan.tensors.items()}
        self.residual, self.squares, self.normed, self.queries, self.mixed, self.units, self.parts, self.arrivals = (
            self.tensors[name] for name in ("residual", "squares", "normed", "queries", "mixed", "units", "parts", "arrivals")
        )
        self.inputs = {"qkv": self.normed, "o": self.mixed, "gate_up": self.normed, "down": self.units, "router": self.normed}
        self.widened = {
            kind: torch.zeros(BUFFERS, elements, dtype=torch.bfloat16, device=device) for kind, elements in plan.buffers.items()
        }
        self.words = torch.zeros(2, dtype=torch.int32, device=device)
        self.table, self.box = cache(self._table), cache(self._box)
        self.mixture = Mixture(state, sizes, plan, self.tensors, self.words) if plan.config.num_experts else None

    def on(self, state: GpuState) -> Chain:
        """The same chain for another state of the model, with the same buffers."""
        other = copy(self)
        other.state, other.box = state, cache(other._box)
        return other

    def launches(self, size: int, past: AttentionTiling | None = None) -> Iterator[Launch]:
        """The chain for a chunk of up to `size` tokens: all layers but the last, and the keys and values of that one; with
        attention over a long past, if so."""
        state, plan, last = self.state, self.plan, self.state.config.num_layers - 1
        buffers = (self.words, self.residual, self.normed, self.squares)
        arguments = (state.weights, state.tokens, state.constants, *buffers, self.sizes, Sizes(plan.embedding))
        yield Launch(read_embedding, min(size, 4 * plan.sms), arguments, early=False)
        yield from (self.widening(kind, 0) for kind in plan.buffers if self.wanted(kind, 0))
        for layer in range(last):
            yield from self.heads(size, layer)
            yield from [self.attention(layer)] if past is None else self.attention_of_past(size, layer, past)
            yield self.product(size, "o", layer, plan.tape.norm_offset(plan.tape.norm_before(plan.after_attention), layer))
            yield from self.mlp(size, layer, plan.tape.norm_offset(plan.tape.norm_before("qkv"), layer + 1))
        yield from self.heads(size, last, keys_alone=True)

    def heads(self, size: int, layer: int, keys_alone: bool = False) -> Iterator[Launch]:
        """A layer's queries, keys and values."""
        state, plan = self.state, self.plan
        if not plan.dimensions.norms_together:
            yield self.product(size, "qkv", layer, keys_alone=keys_alone)
            return
        products = self.tensors["products"]
        if plan.widened and layer > 0:
            yield replace(self.widening("qkv", layer), early=False)  # where the layer before the last had its own
        yield self.single(size, "qkv", layer, products, keys_alone)
        memory = (self.words, products, self.queries, state.constants, state.rope, state.cache)
        arguments = (*memory, layer, self.head_pages, self.sizes, Sizes(plan.embedding))
        yield Launch(read_heads, min(size, ROW_BLOCKS * plan.sms), arguments)

    def mlp(self, size: int, layer: int, norm: int) -> Iterator[Launch]:
        """What follows a layer's attention; the weights of the next layer's norm begin at `norm`."""
        if self.mixture is None:
            yield self.product(size, "gate_up", layer)
            yield self.product(size, "down", layer, norm)
        else:
            yield self.single(size, "router", layer, self.tensors["scores"])
            yield from self.mixture.launches(size, layer, norm)

    def single(self, size: int, kind: str, layer: int, out: torch.Tensor, keys_alone: bool = False) -> Launch:
        """One matrix of a layer whose product is left in `out`, fp32 [chunk, packed rows]."""
        plan, cut, matrix = self.plan, self.plan.cut(size, kind), self.plan.tape.matrix(kind, layer)
        tiles = self.table(kind, cut.tile, keys_alone)
        operands = (self.box(kind, cut.tokens), self.weight_box(kind, cut.tile), self.words, tiles)
        place = layer % BUFFERS if kind in self.widened else layer
        numbers = (place, len(tiles), ceil_div(matrix.columns, STEP), cut.split)
        memory = (*operands, self.parts, self.arrivals, self.squares, out)
        return Launch(read_single, plan.sms, (*memory, *numbers, self.sizes, Sizes(plan.tiling(kind, cut))))

    def widening(self, kind: str, layer: int) -> Launch:
        """One matrix of a layer as bf16, in the buffer from which its product reads it."""
        pages = self.plan.tape.matrix(kind, layer).pages
        arguments = (self.state.weights.view(torch.int32), self.state.constants, *self.source(kind, layer))
        sizes = Sizes(self.plan.widening(kind))
        return Launch(widen_matrix, min(pages * UNITS.value, WIDENERS * self.plan.sms), (*arguments, pages, sizes))

    def buffer(self, kind: str, layer: int) -> torch.Tensor:
        """To which the matrix of a layer is widened, bf16 elements."""
        return self.widened[kind][layer % BUFFERS]

    def source(self, kind: str, layer: int) -> tuple[torch.Tensor, int, int]:
        """A matrix that is widened: to where, its first page, and where the words beside its pages begin."""
        matrix = self.plan.tape.matrix(kind, layer)
        return self.buffer(kind, layer), matrix.first_page, matrix.scale_offset

    def product(self, size: int, kind: str, layer: int, norm: int = -1, keys_alone: bool = False) -> Launch:
        """One matrix of a layer; `norm` is where the weights of the norm begin that reads what it adds to the residual.

        Where weights are quantised, the matrix must have been widened, and the next layer's is along with this.
        """
        plan, state = self.plan, self.state
        cut, matrix = plan.cut(size, kind), plan.tape.matrix(kind, layer)
        tiles = self.table(kind, cut.tile, keys_alone)
        pointers = (self.parts, self.arrivals, self.residual, self.normed, self.squares, self.queries, self.units)
        place = layer % BUFFERS if plan.widened else layer
        numbers = (layer, place, len(tiles), ceil_div(matrix.columns, STEP), cut.split, self.head_pages)
        rest = (matrix.bias_offset, norm)
        operands = (self.box(kind, cut.tokens), self.weight_box(kind, cut.tile), self.words, tiles)
        model = (state.constants, state.rope, state.cache)
        sizes = (self.sizes, Sizes(plan.tiling(kind, cut)))
        if not plan.widened:
            return Launch(read_product, plan.sms, (*operands, *pointers, *model, *numbers, *rest, *sizes))
        following, pages = (layer + 1, matrix.pages) if self.wanted(kind, layer + 1) else (layer, 0)
        buffer, *source = self.source(kind, following)
        memory = (*operands, *pointers, *model, state.weights.view(torch.int32), buffer)
        arguments = (*memory, *numbers, *rest, *source, pages, *sizes, Sizes(plan.widening(kind)))
        return Launch(read_widened, plan.sms, arguments)

    def wanted(self, kind: str, layer: int) -> bool:
        """Whether a chunk needs a matrix: of the last layer QKV alone, for keys and values."""
        last = self.plan.config.num_layers - 1
        return layer < last or (layer == last and kind == "qkv")

    def attention(self, layer: int) -> Launch:
        """One layer's attention."""
        operands = (self.box("queries", CONSUMER_TOKENS), self.box("cache", 0), self.words, self.mixed)
        arguments = (*operands, layer, self.head_pages, Sizes(self.plan.attention))
        return Launch(read_attention, self.plan.sms, arguments)

    def attention_of_past(self, size: int, layer: int, tiling: AttentionTiling) -> Iterator[Launch]:
        """The same of few tokens after a long past: by parts of the keys, which are then added."""
        left = (self.tensors["past"], self.tensors["past_sums"])
        operands = (self.box("queries", CONSUMER_TOKENS), self.box("cache", 0), self.words, *left)
        yield Launch(read_past, self.plan.sms, (*operands, layer, self.head_pages, Sizes(tiling)))
        rows = min(size * tiling.heads, ROW_BLOCKS * self.plan.sms)
        yield Launch(add_parts, rows, (self.words, *left, self.mixed, Sizes(tiling)))

    @property
    def head_pages(self) -> int:
        """Pages of the cache that one K or V head of one layer owns."""
        return self.plan.dimensions.head_pages

    def weight_box(self, kind: str, tile: int) -> TensorDescriptor:
        """The matrices of a kind by boxes of `tile` rows; of quantised ones what they were widened to."""
        return self.box(f"{kind} weights", tile)

    def _table(self, kind: str, tile: int, keys_alone: bool) -> torch.Tensor:
        plan = self.plan
        every = range(ceil_div(plan.tape.matrix(kind).rows, tile))
        wanted = plan.key_value_tiles(tile) if keys_alone else list(every)
        return torch.tensor(wanted, dtype=torch.int32, device=self.state.device)

    def _box(self, what: str, height: int) -> TensorDescriptor:
        """A tensor map: a product's input, by boxes of `height` tokens and a step along K; the queries; the cache; or the
        matrices of a kind, [layer, block, line, column], by boxes of `height` of one layer's rows, on the tape, or
        of one buffer."""
        kind = what.removesuffix(" weights")
        if what in self.inputs:
            return TensorDescriptor.from_tensor(self.inputs[kind], [height, STEP], TMA_LAYOUT)
        if what == "queries":
            return TensorDescriptor.from_tensor(self.queries, [height, self.plan.head_width], TMA_LAYOUT)
        if what == "cache":
            return self.cache_box()
        box = [1, height // BLOCK_ROWS, BLOCK_ROWS, STEP]
        matrix, tape = self.plan.tape.matrix(kind), self.plan.tape
        if kind in self.widened:
            lines = ceil_div(matrix.columns, STEP) * BLOCK_ROWS
            shape = [BUFFERS, matrix.blocks, lines, STEP]
            strides = [matrix.blocks * lines * STEP, lines * STEP, STEP, 1]
            return TensorDescriptor(self.widened[kind].view(-1), shape, strides, box, BOX_LAYOUT)
        lines = matrix.pages_per_block * LINES
        shape = [tape.config.num_layers, matrix.blocks, lines, STEP]
        strides = [layer_pages(tape) * PAGE_ELEMENTS, lines * STEP, STEP, 1]
        first = self.state.weights[matrix.first_page :].view(-1)
        return TensorDescriptor(first, shape, strides, box, BOX_LAYOUT)

    def cache_box(self) -> TensorDescriptor:
        """The cache as [tile of a head, page, position, column], by boxes of one block of keys or values."""
        a, cache_pages = self.plan.attention, self.state.cache
        shape = [a.tiles, len(cache_pages), a.page_positions, STEP]
        strides = [a.page_positions * STEP, PAGE_ELEMENTS, STEP, 1]
        return TensorDescriptor(cache_pages.view(-1), shape, strides, [a.tiles, a.pages, a.page_positions, STEP], BOX_LAYOUT)


def layer_pages(tape: TapeLayout) -> int:
    """Pages of a layer."""
    return tape.matrix("head").first_page // tape.config.num_layers
