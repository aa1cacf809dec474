"""What prefill's kernels are told of a model, and how much memory they take: numbers alone, no GPU."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from instructions.dimensions import Dimensions, ceil_div, next_power_of_two
from megakernel.grouped.tiling import Plan as GroupedPlan
from megakernel.grouped.tiling import Tiling as GroupedTiling
from megakernel.prefill.tiling import CONSUMER_TOKENS, ROUTED, STEP, AttentionTiling, Cut, Tiling, Widening, choose_cut, slots
from models.config import ModelConfig
from models.formats import PLAIN, Formats
from models.tape import BLOCK_ROWS, TapeLayout

CHUNK = 4096  # most tokens of a chunk
CLASSES = (64, 128, 256, 512, 1024, 2048, CHUNK)  # most tokens of a chunk of each class
KINDS = ("qkv", "o", "gate_up", "down")  # of matrices that all tokens are multiplied with,
MIXTURE_KINDS = ("qkv", "o", "router")  # and where layers hold experts
EXPERT_KINDS = ("expert_gate_up", "expert_down")
SINGLE, HALF, WHOLE = torch.float32, torch.bfloat16, torch.int32
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # by name: type and shape
LONG_PAST = 2048  # positions before a chunk from which on the keys of few queries are shared by SMs,
MOST_PARTS = 8  # in so many parts at most
BUFFERS = 2  # to which the quantised matrices of a kind are widened, layer by layer in turn
PIECE = 64  # columns of the residual stream whose squares are summed together
NORMED_TILE = 128  # least rows of a tile of the QKV matrix where heads are normed: it holds whole heads
WIDEST_HEAD = 256  # elements of a head as it is stored that the matrix instruction takes


def padded(elements: int) -> int:
    """Elements rounded up to whole 128-byte lines of bf16."""
    return STEP * ceil_div(elements, STEP)


@dataclass(frozen=True)
class Plan:
    """Prefill of a model on `sms` SMs, for a cache of `capacity` positions."""

    config: ModelConfig
    sms: int
    capacity: int
    formats: Formats = PLAIN

    @property
    def possible(self) -> bool:
        """Whether prefill's kernels take the model; else a prompt is decoded token by token.

        Heads are not too wide and, where each is normed by itself, whole tiles of the QKV matrix hold whole heads.
        """
        rows = self.dimensions.head_rows
        whole = rows <= NORMED_TILE and NORMED_TILE % rows == 0
        return self.head_width <= WIDEST_HEAD and (whole or not self.own_norms)

    @property
    def own_norms(self) -> bool:
        """Whether each head of queries and keys is normed by itself: as its tile of the product is finished."""
        return self.dimensions.head_norms and not self.dimensions.norms_together

    @property
    def kinds(self) -> tuple[str, ...]:
        """The matrices of a layer that all tokens of a chunk are multiplied with, in the order in which they meet them."""
        return MIXTURE_KINDS if self.config.num_experts else KINDS

    @property
    def after_attention(self) -> str:
        """The first matrix after attention's."""
        return self.kinds[2]

    @cached_property
    def tape(self) -> TapeLayout:
        """Where the matrices lie."""
        return self.dimensions.tape

    @cached_property
    def dimensions(self) -> Dimensions:
        """Heads and pages of the cache."""
        return Dimensions(self.config, 2, self.capacity, self.capacity, 1, formats=self.formats)

    @property
    def classes(self) -> tuple[int, ...]:
        """Most tokens of a chunk of each class; no longer ones than the cache can hold."""
        return CLASSES[: bisect_left(CLASSES, min(self.capacity, CHUNK)) + 1]

    @property
    def chunk(self) -> int:
        """Most tokens of a chunk."""
        return self.classes[-1]

    @property
    def head_width(self) -> int:
        """Elements of one head as the cache and the queries hold it, whole lines of 64."""
        return self.dimensions.head_tiles * STEP

    @property
    def squares(self) -> int:
        """Sums of squares in which a token's residual stream is told, rounded up to a power of two."""
        return next_power_of_two(ceil_div(self.config.hidden_size, PIECE))

    def cut(self, size: int, kind: str) -> Cut:
        """How a product of a class is cut."""
        matrix = self.tape.matrix(kind)
        least = NORMED_TILE if kind == "qkv" and self.own_norms else 0
        return choose_cut(kind, size, matrix.rows, matrix.columns, self.sms, least)

    def tiling(self, kind: str, cut: Cut) -> Tiling:
        """What a product's kernel is told."""
        single = kind == "router" or (kind == "qkv" and self.dimensions.norms_together)
        return Tiling(
            kind="residual" if kind in ("o", "down") else "single" if single else kind,
            tokens=cut.tokens,
            tile=cut.tile,
            slots=slots(cut.tokens, cut.tile),
            consumers=cut.tokens // CONSUMER_TOKENS,
            blocks=0 if kind in ("o", "down") else self.tape.matrix(kind).blocks,
            squares=self.squares,
            heads=self.config.num_heads,
            head=self.head_width,
            normed=padded(self.config.hidden_size),
            units=padded(self.config.intermediate_size),
        )

    @property
    def grouped(self) -> GroupedPlan:
        """How the experts' products are launched."""
        return GroupedPlan(self.sms)

    def grouped_tiling(self, kind: str) -> GroupedTiling:
        """What the kernel of the experts' products is told."""
        tiling = self.grouped.tiling(self.config.num_experts)
        return replace(tiling, paged=True, units=kind == "expert_gate_up")

    @property
    def widened(self) -> bool:
        """Whether weights are quantised: they are widened to bf16, a layer ahead of the products."""
        return not self.tape.matrix("qkv").format.plain

    def widening(self, kind: str) -> Widening:
        """What the kernel that widens a matrix is told."""
        matrix = self.tape.matrix(kind)
        return Widening(matrix.format, matrix.blocks, matrix.pages_per_block, ceil_div(matrix.columns, STEP))

    @cached_property
    def buffers(self) -> dict[str, int]:
        """Elements of the buffers, `BUFFERS` for each kind of matrix, to which weights are widened: one is written while
        another is read.  A router is never quantised, and experts have a buffer of their own."""
        matrices = map(self.tape.matrix, self.kinds if self.widened else ())
        return {matrix.kind: matrix.rows * padded(matrix.columns) for matrix in matrices if matrix.kind != "router"}

    @property
    def experts_buffer(self) -> int:
        """Elements of the buffer to which the matrices of one kind of all of a layer's experts are widened."""
        matrices = map(self.tape.matrix, EXPERT_KINDS)
        return max(self.config.num_experts * matrix.rows * padded(matrix.columns) for matrix in matrices)

    @property
    def embedding(self) -> Tiling:
        """What the embedding's kernel is told: of it all, the sizes of a row."""
        return self.tiling("qkv", Cut(CONSUMER_TOKENS, STEP, 1))

    @property
    def attention(self) -> AttentionTiling:
        """What attention's kernel is told; heads of more than 128 elements take shorter blocks of keys."""
        dimensions, config = self.dimensions, self.config
        wide = self.head_width > 128
        keys = 64 if wide else 128
        return AttentionTiling(
            consumers=2,
            keys=keys,
            slots=2 if wide else 4,
            tiles=dimensions.head_tiles,
            pages=keys // dimensions.page_positions,
            page_positions=dimensions.page_positions,
            width=self.head_width,
            heads=config.num_heads,
            group=config.group,
            kv_heads=config.num_kv_heads,
            head_rows=dimensions.head_rows,
            scale=config.attention_scale,
        )

    def past(self, size: int) -> AttentionTiling | None:
        """What attention's kernel is told of a class of so few tokens that, after a long past, a head's keys are shared by
        several SMs; None where they are not: two heads of a group go together."""
        pairs = ceil_div(size, CONSUMER_TOKENS) * (self.config.num_heads // 2)
        parts = 2 ** (min(MOST_PARTS, self.sms // pairs).bit_length() - 1) if self.sms >= pairs else 1
        shared = parts > 1 and self.config.group % 2 == 0 and self.capacity > LONG_PAST
        return replace(self.attention, parts=parts) if shared else None

    @cached_property
    def past_rows(self) -> int:
        """Rows that all parts of a past leave at most: one a query, head and part."""
        tilings = {size: self.past(size) for size in self.classes}
        rows = {size: ceil_div(size, CONSUMER_TOKENS) * CONSUMER_TOKENS * self.config.num_heads for size in tilings}
        return max((rows[size] * tiling.parts for size, tiling in tilings.items() if tiling is not None), default=0)

    def tiles(self, size: int, kind: str) -> int:
        """Tiles of a product of a class."""
        cut = self.cut(size, kind)
        return ceil_div(size, cut.tokens) * ceil_div(self.tape.matrix(kind).rows, cut.tile)

    @cached_property
    def split(self) -> list[tuple[int, str]]:
        """The products that are split along K."""
        return [(size, kind) for size in self.classes for kind in self.kinds if self.cut(size, kind).split > 1]

    @cached_property
    def parts(self) -> int:
        """Elements of the longest list of parts that a product leaves."""
        cuts = [(self.cut(size, kind), self.tiles(size, kind)) for size, kind in self.split]
        return max([1, *(tiles * cut.split * cut.tokens * cut.tile for cut, tiles in cuts)])

    @cached_property
    def arrivals(self) -> int:
        """Counters of parts that are there."""
        cuts = [(self.cut(size, kind), self.tiles(size, kind)) for size, kind in self.split]
        return max([1, *(tiles * cut.tokens // CONSUMER_TOKENS for cut, tiles in cuts)])

    def key_value_tiles(self, tile: int) -> list[int]:
        """The tiles of the QKV matrix that hold a row of a key or a value."""
        blocks = np.arange(self.tape.matrix("qkv").blocks)
        slot = blocks // self.dimensions.head_blocks % (self.config.group + 2)
        return np.unique(blocks[slot >= self.config.group] // (tile // BLOCK_ROWS)).tolist()

    @property
    def tensors(self) -> Tensors:
        """What a chunk leaves between the kernels; row i of most belongs to the chunk's token i."""
        config, rows = self.config, self.chunk
        found: Tensors = {
            "residual": (SINGLE, (rows, config.hidden_size)),
            "squares": (SINGLE, (rows, self.squares)),
            "normed": (HALF, (rows, padded(config.hidden_size))),
            "queries": (HALF, (rows, config.num_heads * self.head_width)),
            "mixed": (HALF, (rows, config.num_heads * config.padded_head_dim)),
            "parts": (SINGLE, (self.parts,)),
            "arrivals": (WHOLE, (self.arrivals,)),
        }
        if self.past_rows:
            found["past"] = SINGLE, (self.past_rows, self.head_width)
            found["past_sums"] = SINGLE, (self.past_rows, 2)
        if self.dimensions.norms_together:
            found["products"] = (SINGLE, (rows, self.tape.matrix("qkv").rows))
        return found | (self.routed if config.num_experts else {"units": (HALF, (rows, padded(config.intermediate_size)))})

    @property
    def routed(self) -> Tensors:
        """The same of a mixture of experts: what `megakernel.device.prefill.routing` finds, and the rows of all slots."""
        config, rows = self.config, self.chunk
        experts, slots = config.num_experts, rows * config.experts_per_token
        found: Tensors = {"widened": (HALF, (self.experts_buffer,))} if self.widened else {}
        return found | {
            "scores": (SINGLE, (rows, self.tape.matrix("router").rows)),
            "slots": (WHOLE, (rows, experts)),
            "shares": (SINGLE, (rows, config.experts_per_token)),
            "counts": (WHOLE, (ceil_div(rows, ROUTED), experts)),
            "places": (WHOLE, (rows, config.experts_per_token)),
            "ends": (WHOLE, (experts,)),
            "rows": (HALF, (slots, padded(config.hidden_size))),
            "row_shares": (SINGLE, (slots,)),
            "units": (HALF, (slots, padded(config.intermediate_size))),
            "outputs": (HALF, (slots, padded(config.hidden_size))),
        }

    @property
    def bytes(self) -> int:
        """GPU memory of all that a chunk leaves between the kernels."""
        activations = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors.values())
        return activations + 2 * BUFFERS * sum(self.buffers.values())
