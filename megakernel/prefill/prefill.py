"""A prompt on the GPU, chunk by chunk: one CUDA graph of kernels a class of chunk lengths.

A chunk of tokens goes through all layers but the last, and of the last through its keys and values alone: what the rest of
the last layer makes of the earlier tokens nobody reads.  The last token's residual stream before the last layer is left in
the state's `hidden`, where the persistent kernel's tail program takes it.

A kernel takes the chunk's start and length from memory, so one graph serves all lengths of its class.  Classes differ in how
products are cut; a chunk's class depends on its length alone, so the same tokens from the same position give the same bits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from instructions.dimensions import ceil_div, next_power_of_two
from megakernel.device.prefill.attention import read_attention
from megakernel.device.prefill.embedding import read_embedding
from megakernel.device.prefill.projections import read_gate_up, read_qkv, read_residual
from megakernel.options import OPTIONS, TMA_LAYOUT, Sizes
from megakernel.prefill.tiling import CONSUMER_TOKENS, STEP, AttentionTiling, Cut, Tiling, choose_cut, slots
from models.config import ModelConfig
from models.tape import BLOCK_ROWS, PAGE_BYTES, TILES_PER_PAGE, TapeLayout

CHUNK = 4096  # most tokens of a chunk
CLASSES = (64, 128, 256, 512, 1024, 2048, CHUNK)  # most tokens of a chunk of each class
UNDER_WAY = 2  # chunks enqueued at once, so that an interrupt is answered soon
LINES = TILES_PER_PAGE * BLOCK_ROWS  # 128-byte lines of a page
WEIGHTS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def padded(elements: int) -> int:
    """Elements rounded up to whole 128-byte lines of bf16."""
    return STEP * ceil_div(elements, STEP)


class Prefill:
    """The kernels that read a prompt into a `GpuState`'s cache, compiled and captured when constructed.

    `sizes` are the decode kernel's of the same model, `sms` the multiprocessors to fill.
    """

    def __init__(self, state: Any, sizes: Sizes, sms: int, chunk: int = CHUNK) -> None:
        self.state, self.sizes, self.sms = state, sizes, sms
        config, device = state.config, state.device
        self.config, self.tape = config, TapeLayout.from_config(config, 2)
        self.chunk = min(chunk, CLASSES[bisect_left(CLASSES, min(state.capacity, CHUNK))])
        self.attention = attention_tiling(config, sizes)
        half = {"dtype": torch.bfloat16, "device": device}
        single = {"dtype": torch.float32, "device": device}
        rows, hidden = self.chunk, config.hidden_size
        self.residual = torch.zeros(rows, hidden, **single)
        self.normed = torch.zeros(rows, padded(hidden), **half)
        self.squares = torch.zeros(rows, square_places(config), **single)
        self.queries = torch.zeros(rows, config.num_heads * self.attention.width, **half)
        self.mixed = torch.zeros(rows, config.num_heads * config.padded_head_dim, **half)
        self.units = torch.zeros(rows, padded(config.intermediate_size), **half)
        self.words = torch.zeros(2, dtype=torch.int32, device=device)
        self.inputs = {"qkv": self.normed, "o": self.mixed, "gate_up": self.normed, "down": self.units}
        self.cuts = {size: self.cuts_of(size) for size in CLASSES if size <= self.chunk}
        parts, arrivals = 1, 1
        for size, cuts in self.cuts.items():
            for kind, cut in cuts.items():
                if cut.split > 1:
                    tiles = ceil_div(size, cut.tokens) * ceil_div(self.tape.matrix(kind).rows, cut.tile)
                    parts = max(parts, tiles * cut.split * cut.tokens * cut.tile)
                    arrivals = max(arrivals, tiles * cut.tokens // CONSUMER_TOKENS)
        self.parts = torch.zeros(parts, **single)
        self.arrivals = torch.zeros(arrivals, dtype=torch.int32, device=device)
        self.tables: dict[Any, torch.Tensor] = {}
        self.descriptors: dict[Any, TensorDescriptor] = {}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for size in self.cuts:
            self.capture(size)

    def cuts_of(self, size: int) -> dict[str, Cut]:
        """How each product of a class is cut."""
        matrices = {kind: self.tape.matrix(kind) for kind in self.inputs}
        return {kind: choose_cut(kind, size, matrix.rows, matrix.columns, self.sms) for kind, matrix in matrices.items()}

    def capture(self, size: int) -> None:
        """Compile a class's kernels and record their chain."""
        self.words.zero_()
        self.enqueue(size)  # of no token: loads the kernels
        torch.cuda.current_stream(self.state.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.enqueue(size)
        self.graphs[size] = graph

    def launch(self, start: int, stop: int, report: Callable[[int], None] | None = None) -> None:
        """Compute positions [start, stop) of the state's tokens; the last one's residual goes to the state's `hidden`.

        Enqueues on the current stream and returns when at most two chunks are under way; `report` is told the position up
        to which all is done.
        """
        under_way: deque[tuple[int, torch.cuda.Event]] = deque()
        for first in range(start, stop, self.chunk):
            last = min(first + self.chunk, stop)
            self.read(first, last - first)
            event = torch.cuda.Event()
            event.record()
            under_way.append((last, event))
            if len(under_way) >= UNDER_WAY and last < stop:
                done, event = under_way.popleft()
                event.synchronize()
                if report is not None:
                    report(done)
        self.state.hidden.copy_(self.residual[last - first - 1])

    def read(self, start: int, count: int) -> None:
        """Enqueue one chunk."""
        words = torch.tensor([start, count], dtype=torch.int32).pin_memory()
        self.words.copy_(words, non_blocking=True)
        self.graphs[CLASSES[bisect_left(CLASSES, count)]].replay()

    def enqueue(self, size: int) -> None:
        """The chain of kernels for a chunk of up to `size` tokens."""
        state, layers = self.state, self.config.num_layers
        read_embedding[(min(size, 4 * self.sms),)](
            state.weights,
            state.tokens,
            state.constants,
            self.words,
            self.residual,
            self.normed,
            self.squares,
            self.sizes,
            Sizes(self.tiling("qkv", self.cuts[size]["qkv"])),
            num_warps=4,
            **OPTIONS,
        )
        product = partial(self.product, size)
        for layer in range(layers - 1):
            product(read_qkv, "qkv", layer)
            self.attend(layer)
            product(read_residual, "o", layer, self.bias("o", layer), self.tape.norm_offset("mlp", layer))
            product(read_gate_up, "gate_up", layer)
            product(read_residual, "down", layer, self.bias("down", layer), self.tape.norm_offset("attention", layer + 1))
        product(read_qkv, "qkv", layers - 1, tiles=self.key_value_tiles(self.cuts[size]["qkv"].tile))

    def bias(self, kind: str, layer: int) -> int:
        """Where a matrix's bias starts in the constants, -1 without one."""
        return self.tape.matrix(kind, layer).bias_offset

    def product(self, size: int, kernel: Any, kind: str, layer: int, *rest: int, tiles: torch.Tensor | None = None) -> None:
        """Enqueue one product."""
        cut, matrix, state = self.cuts[size][kind], self.tape.matrix(kind), self.state
        tiling = self.tiling(kind, cut)
        tiles = self.table(("all", ceil_div(matrix.blocks, cut.tile // BLOCK_ROWS))) if tiles is None else tiles
        kernel[(self.sms,)](
            self.input_descriptor(kind, cut.tokens),
            self.weight_descriptor(kind, cut.tile),
            self.words,
            tiles,
            self.parts,
            self.arrivals,
            self.residual,
            self.normed,
            self.squares,
            self.queries,
            self.units,
            state.constants,
            state.rope,
            state.cache,
            layer,
            len(tiles),
            ceil_div(matrix.columns, STEP),
            cut.split,
            self.head_pages,
            *rest,
            self.sizes,
            Sizes(tiling),
            num_warps=4,
            **OPTIONS,
        )

    def attend(self, layer: int) -> None:
        """Enqueue one layer's attention."""
        a = self.attention
        queries = self.descriptor(
            "queries", lambda: TensorDescriptor.from_tensor(self.queries, [CONSUMER_TOKENS, a.width], TMA_LAYOUT)
        )
        read_attention[(self.sms,)](
            queries, self.cache_descriptor(), self.words, self.mixed, layer, self.head_pages, Sizes(a), num_warps=4, **OPTIONS
        )

    @property
    def head_pages(self) -> int:
        """Pages of the cache that one K or V head of one layer owns."""
        return len(self.state.cache) // (2 * self.config.num_layers * self.config.num_kv_heads)

    def tiling(self, kind: str, cut: Cut) -> Tiling:
        """A product's tiling."""
        config = self.config
        return Tiling(
            cut.tokens, cut.tile, slots(cut.tokens, cut.tile), cut.tokens // CONSUMER_TOKENS, self.tape.matrix(kind).blocks,
            self.squares.shape[1], config.num_heads, self.attention.width, self.normed.shape[1], self.units.shape[1],
        )  # fmt: skip

    def table(self, key: tuple[str, int], numbers: Any = None) -> torch.Tensor:
        """Numbers of tiles on the GPU, made once."""
        if key not in self.tables:
            numbers = np.arange(key[1]) if numbers is None else numbers
            self.tables[key] = torch.tensor(np.asarray(numbers), dtype=torch.int32, device=self.state.device)
        return self.tables[key]

    def key_value_tiles(self, tile: int) -> torch.Tensor:
        """The tiles of the QKV matrix that hold a row of a key or a value."""
        head_blocks = self.config.padded_head_dim // BLOCK_ROWS
        blocks = np.arange(self.tape.matrix("qkv").blocks)
        wanted = blocks[blocks // head_blocks % (self.config.group + 2) >= self.config.group]
        return self.table(("kv", tile), np.unique(wanted // (tile // BLOCK_ROWS)))

    def descriptor(self, key: Any, make: Callable[[], TensorDescriptor]) -> TensorDescriptor:
        """A tensor map, made once."""
        if key not in self.descriptors:
            self.descriptors[key] = make()
        return self.descriptors[key]

    def input_descriptor(self, kind: str, tokens: int) -> TensorDescriptor:
        """A product's input, by boxes of `tokens` tokens and one step along K."""
        return self.descriptor(
            (kind, tokens), lambda: TensorDescriptor.from_tensor(self.inputs[kind], [tokens, STEP], TMA_LAYOUT)
        )

    def weight_descriptor(self, kind: str, tile: int) -> TensorDescriptor:
        """The matrices of a kind on the tape, [layer, block, line, column], by boxes of one tile of one layer's rows."""

        def make() -> TensorDescriptor:
            matrix = self.tape.matrix(kind)
            lines = matrix.pages_per_block * LINES
            stride = layer_pages(self.tape, kind) * PAGE_BYTES // 2
            base = self.state.weights[matrix.first_page :].view(-1)
            shape = [self.config.num_layers, matrix.blocks, lines, STEP]
            strides = [stride, lines * STEP, STEP, 1]
            return TensorDescriptor(base, shape, strides, [1, tile // BLOCK_ROWS, BLOCK_ROWS, STEP], WEIGHTS_LAYOUT)

        return self.descriptor((kind, "tape", tile), make)

    def cache_descriptor(self) -> TensorDescriptor:
        """The cache, [tile of a head, page, position, column], by boxes of one block of keys."""
        a, cache = self.attention, self.state.cache

        def make() -> TensorDescriptor:
            shape = [a.tiles, len(cache), a.page_positions, STEP]
            strides = [a.page_positions * STEP, PAGE_BYTES // 2, STEP, 1]
            return TensorDescriptor(cache.view(-1), shape, strides, [a.tiles, a.pages, a.page_positions, STEP], WEIGHTS_LAYOUT)

        return self.descriptor("cache", make)


def layer_pages(tape: TapeLayout, kind: str) -> int:
    """Pages from a matrix to the same one of the next layer; of a whole layer where there is but one."""
    if tape.config.num_layers > 1:
        return tape.matrix(kind, 1).first_page - tape.matrix(kind, 0).first_page
    return sum(tape.matrix(kind).pages for kind in ("qkv", "o", "gate_up", "down"))


def square_places(config: ModelConfig) -> int:
    """Sums of squares that a token's residual stream is told in: one for 64 columns, rounded up to a power of two."""
    return next_power_of_two(ceil_div(config.hidden_size, 64))


def attention_tiling(config: ModelConfig, sizes: Sizes) -> AttentionTiling:
    """The tiling of attention for a model's heads."""
    geometry = sizes.geometry
    tiles = geometry.head_tiles
    keys = 128 if tiles <= 2 else 64
    return AttentionTiling(
        consumers=2,
        keys=keys,
        slots=4 if tiles <= 2 else 2,
        tiles=tiles,
        pages=keys // geometry.page_positions,
        page_positions=geometry.page_positions,
        width=tiles * STEP,
        heads=config.num_heads,
        group=config.group,
        kv_heads=config.num_kv_heads,
        head_rows=geometry.head_rows,
        scale=geometry.scale,
    )
