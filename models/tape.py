"""The weight tape: where every weight lies, page by page, in the order in which a decode step streams them.

A page is 16 KiB: 8 consecutive tiles of one block of 16 rows, each tile 16 rows of 128 bytes along K, so
`[8, 16, tile_columns]`. A matrix is `[row block][page along K]`; rows are padded to whole blocks and K to whole pages,
with zeros. Rows are permuted so that one block holds what must meet: the two halves of a RoPE pair, or gate and up of
the same unit.

A mixture of experts has a matrix of a kind for every expert, one after another, all of the same size.

Quantised matrices (`models.formats`) have pages of the same bytes, which hold more columns, and for every page some words in
the constants: those of a page p of the body lie at `scale_offset`, page by page, as those of the head do.

This module is only the map. Copying weights along it is `models.packing`; which SM reads which page is the scheduler's
business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product

import numpy as np

from models.config import ModelConfig
from models.errors import UserError
from models.families import layer_of
from models.families.base import EMBEDDING, FINAL_NORM, HEAD, Layer, layer_module
from models.formats import PLAIN, Formats, WeightFormat, check_formats, format_of

PAGE_BYTES = 16384
TILE_BYTES = 128
BLOCK_ROWS = 16
TILES_PER_PAGE = PAGE_BYTES // (TILE_BYTES * BLOCK_ROWS)
HALF_BLOCK = BLOCK_ROWS // 2
CONSTANT_ALIGNMENT = 32  # fp32 elements: every vector of constants starts on a 128-byte line


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix on the tape, in packed rows and packed columns.

    `row_map` int32 [blocks * 16]: the row of the concatenated `sources` that each packed row holds, -1 for a zero row.
    `column_map` int32 [columns]: the source column of each packed column, -1 for zero; None means the identity.
    `columns` is the length of the activation that it multiplies, before K is padded to `pages_per_block` whole pages.
    `bias_offset` is where the bias starts in the constants, in packed row order; -1 without a bias. `head_norm_offset` is
    where the norm weights of a query head start, in packed row order, and after them those of a key head, both
    [padded_head_dim]; or of all query heads and of all key heads, as `head_norm_heads` counts them; -1 without such norms.
    `scale_offset` is where the words beside its first page lie in the constants, -1 without any.
    """

    kind: str
    layer: int
    blocks: int
    pages_per_block: int
    first_page: int
    columns: int
    row_map: np.ndarray
    column_map: np.ndarray | None
    sources: tuple[str, ...]
    source_rows: tuple[int, ...]
    bias_sources: tuple[str, ...]
    bias_offset: int
    head_norm_sources: tuple[str, ...]
    head_norm_heads: tuple[int, ...]
    head_norm_offset: int
    format: WeightFormat
    scale_offset: int
    expert: int = 0

    @property
    def pages(self) -> int:
        """Pages of the whole matrix."""
        return self.blocks * self.pages_per_block

    @property
    def bytes(self) -> int:
        """Bytes of the whole matrix, with what lies beside its pages."""
        return self.pages * (PAGE_BYTES + 4 * self.format.scale_words)

    @property
    def rows(self) -> int:
        """Packed rows, zero rows included."""
        return self.blocks * BLOCK_ROWS

    def source_slice(self, source: str) -> slice:
        """The rows of one source, weight or bias, within the concatenation of all."""
        index = (self.sources if source in self.sources else self.bias_sources).index(source)
        start = sum(self.source_rows[:index])
        return slice(start, start + self.source_rows[index])


@dataclass(frozen=True, eq=False)
class TapeLayout:
    """All matrices of a model, in tape order: for each layer its linears, of experts one after another; then the head; then the
    embedding when it is not tied. `streamed_pages` are those that decode steps read (all but the embedding). `constant_count`
    fp32 constants hold the norm weights, the biases and what lies beside quantised pages; every vector starts at a multiple of
    `CONSTANT_ALIGNMENT`. A tied embedding is the head where that is not quantised."""

    config: ModelConfig
    itemsize: int
    formats: Formats
    matrices: tuple[Matrix, ...]
    pages: int
    streamed_pages: int
    constant_count: int

    @classmethod
    def from_config(cls, config: ModelConfig, itemsize: int, formats: Formats = PLAIN) -> TapeLayout:
        """The layout for weights of `itemsize` bytes, 2 (bf16) or 4 (fp32), or of other formats beside such activations."""
        if itemsize not in (2, 4):
            raise UserError(f"weights of {itemsize} bytes are not supported: pack as bfloat16 (2 bytes) or float32 (4 bytes)")
        check_formats(formats, itemsize)
        return _Builder(config, itemsize, formats).build()

    @property
    def tile_columns(self) -> int:
        """Columns of one tile: 64 in bf16, 32 in fp32."""
        return TILE_BYTES // self.itemsize

    @property
    def page_columns(self) -> int:
        """Columns of one page: 512 in bf16, 256 in fp32."""
        return TILES_PER_PAGE * self.tile_columns

    @property
    def page_elements(self) -> int:
        """Weights in one page, zeros included."""
        return PAGE_BYTES // self.itemsize

    @cached_property
    def layer(self) -> Layer:
        """What each layer holds."""
        return layer_of(self.config)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of a layer's matrices, in tape order."""
        return tuple(linear.kind for linear in self.layer.linears)

    @cached_property
    def _places(self) -> dict[str, range]:
        """Where the matrices of a kind lie among those of a layer."""
        places, start = {}, 0
        for linear in self.layer.linears:
            places[linear.kind] = range(start, start := start + len(linear.copies(self.config)))
        return places

    def matrix(self, kind: str, layer: int = 0, expert: int = 0) -> Matrix:
        """The matrix of one kind (one of `kinds`; "head", "embedding" with layer 0), of experts that of one. A tied embedding
        is the head."""
        layers, places = self.config.num_layers, self._places
        of_layer = sum(map(len, places.values()))
        if kind in places and 0 <= layer < layers and 0 <= expert < len(places[kind]):
            return self.matrices[layer * of_layer + places[kind][expert]]
        if kind == "head" and layer == 0:
            return self.matrices[layers * of_layer]
        if kind == "embedding" and layer == 0:
            return self.matrices[-1]
        raise KeyError(f"no matrix {kind!r} in layer {layer} of a model with {layers} layers")

    @property
    def halved(self) -> bool:
        """Whether of the last page of a row block of the experts' down matrices only one half is read: the rest is padding,
        and what an older page leaves in its place are numbers, since nothing is quantised."""
        if not self.config.num_experts or not all(matrix.format.plain for matrix in self.matrices):
            return False
        down = self.matrix("expert_down")
        return 0 < down.columns % down.format.columns <= down.format.columns // 2

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the weights that a decode step reads, with what lies beside them: of experts those of the chosen ones."""
        taken, all_of_them = self.config.experts_per_token, self.config.num_experts
        read = sum(matrix.bytes for matrix in self.matrices if matrix.first_page < self.streamed_pages)
        experts = [matrix for matrix in self.matrices if matrix.kind.startswith("expert_")]
        of_experts = sum(matrix.bytes for matrix in experts)
        halves = sum(matrix.blocks for matrix in experts if matrix.kind == "expert_down") if self.halved else 0
        left_out = of_experts * (all_of_them - taken) + halves * taken * PAGE_BYTES // 2
        return read - left_out // max(1, all_of_them)

    @property
    def bytes(self) -> int:
        """Bytes of all weights, with what lies beside them."""
        return sum(matrix.bytes for matrix in self.matrices)

    def norm_before(self, kind: str) -> str:
        """The kind of the norm before the matrices of one kind: one of the layer's, or "final" before the head."""
        if kind == "head":
            return "final"
        norm = self.layer.linear(kind).norm
        if norm is None:
            raise KeyError(f"no norm before {kind!r}")
        return norm.kind

    def norm_offset(self, kind: str, layer: int = 0) -> int:
        """Where the norm weights [hidden_size] start in the constants: the kind of a norm of a layer, or "final"."""
        kinds = [norm.kind for norm in self.layer.norms]
        if kind == "final" and layer == 0:
            index = len(kinds) * self.config.num_layers
        elif kind in kinds and 0 <= layer < self.config.num_layers:
            index = len(kinds) * layer + kinds.index(kind)
        else:
            raise KeyError(f"no {kind!r} norm in layer {layer} of a model with {self.config.num_layers} layers")
        return index * align_constants(self.config.hidden_size)

    def norms(self) -> list[tuple[str, int]]:
        """Kind and layer of every norm of the residual stream, in the order of the constants."""
        layers = range(self.config.num_layers)
        return [(norm.kind, layer) for layer in layers for norm in self.layer.norms] + [("final", 0)]

    def norm_source(self, kind: str, layer: int = 0) -> str:
        """The Hugging Face name of the norm weights at `norm_offset(kind, layer)`."""
        if kind == "final":
            return f"{FINAL_NORM}.weight"
        [norm] = [norm for norm in self.layer.norms if norm.kind == kind]
        return f"{layer_module(layer, norm.module)}.weight"


def align_constants(count: int) -> int:
    """`count` fp32 constants rounded up to whole 128-byte lines."""
    return CONSTANT_ALIGNMENT * math.ceil(count / CONSTANT_ALIGNMENT)


def natural_rows(rows: int) -> np.ndarray:
    """Rows in their own order, padded to whole blocks: int32 [16 * ceil(rows / 16)]."""
    index = np.arange(BLOCK_ROWS * math.ceil(rows / BLOCK_ROWS), dtype=np.int32)
    return np.where(index < rows, index, -1).astype(np.int32)


def paired_head_rows(head_dim: int) -> np.ndarray:
    """A query or key head: row j < 8 of block b holds dim 8b + j, row j + 8 its RoPE partner, head_dim / 2 further.

    The partners are those of Hugging Face's `rotate_half`. int32 [padded head_dim], -1 where 8b + j >= head_dim / 2.
    """
    half = head_dim // 2
    first = _half_blocks(half)
    pairs = np.concatenate([first, first + half], axis=1)  # [blocks, 2, 8]
    return np.where(first < half, pairs, -1).astype(np.int32).reshape(-1)


def qkv_rows(config: ModelConfig) -> np.ndarray:
    """For each KV head: its query heads, its key head, its value head, as rows of q, k, v concatenated."""
    dim = config.head_dim
    paired, plain = paired_head_rows(dim), natural_rows(dim)
    key_start = config.num_heads * dim
    value_start = key_start + config.num_kv_heads * dim
    heads = []
    for kv_head in range(config.num_kv_heads):
        for query_head in range(kv_head * config.group, (kv_head + 1) * config.group):
            heads.append(_shifted(paired, query_head * dim))
        heads.append(_shifted(paired, key_start + kv_head * dim))
        heads.append(_shifted(plain, value_start + kv_head * dim))
    return np.concatenate(heads)


def gate_up_rows(intermediate: int) -> np.ndarray:
    """Row j < 8 of block b is gate row 8b + j, row j + 8 is up row 8b + j, as rows of gate, up concatenated."""
    unit = _half_blocks(intermediate)
    pairs = np.concatenate([unit, unit + intermediate], axis=1)  # [blocks, 2, 8]
    return np.where(unit < intermediate, pairs, -1).astype(np.int32).reshape(-1)


def attention_columns(config: ModelConfig) -> np.ndarray | None:
    """Attention writes [heads, padded head_dim]: the column of the output projection for each, or None when nothing is
    padded."""
    if config.padded_head_dim == config.head_dim:
        return None
    head = natural_rows(config.head_dim)  # padded head_dim is whole blocks of 16 as well
    return np.concatenate([_shifted(head, index * config.head_dim) for index in range(config.num_heads)])


def _half_blocks(count: int) -> np.ndarray:
    """0, 1, 2, ... up to `count` rounded up to whole half blocks: int32 [blocks, 1, 8]."""
    return np.arange(HALF_BLOCK * math.ceil(count / HALF_BLOCK), dtype=np.int32).reshape(-1, 1, HALF_BLOCK)


def _shifted(rows: np.ndarray, start: int) -> np.ndarray:
    return np.where(rows >= 0, rows + start, -1).astype(np.int32)


# How the rows of a linear lie on the tape, and, by what it multiplies, its columns.
ROW_ORDERS: dict[str, Callable[[ModelConfig], np.ndarray]] = {
    "heads": qkv_rows,
    "hidden": lambda config: natural_rows(config.hidden_size),
    "gate_up": lambda config: gate_up_rows(config.intermediate_size),
    "experts": lambda config: natural_rows(config.num_experts),
}
COLUMN_ORDERS: dict[str, Callable[[ModelConfig], np.ndarray | None]] = {
    "hidden": lambda config: None,
    "attention": attention_columns,
    "mlp": lambda config: None,
}


class _Builder:
    """Lays matrices and constants one after another."""

    def __init__(self, config: ModelConfig, itemsize: int, formats: Formats) -> None:
        self.config = config
        self.layer = layer_of(config)
        self.itemsize = itemsize
        self.formats = formats
        self.matrices: list[Matrix] = []
        self.page = 0
        self.constant = (len(self.layer.norms) * config.num_layers + 1) * align_constants(config.hidden_size)

    def build(self) -> TapeLayout:
        config = self.config
        row_maps = {linear.kind: ROW_ORDERS[linear.row_order](config) for linear in self.layer.linears}
        column_maps = {linear.kind: COLUMN_ORDERS[linear.source](config) for linear in self.layer.linears}
        for layer, linear in product(range(config.num_layers), self.layer.linears):
            for expert in linear.copies(config):
                self.add(
                    linear.kind,
                    layer,
                    {layer_module(layer, name): rows for name, rows in linear.rows(config, expert).items()},
                    getattr(config, linear.columns),
                    row_maps[linear.kind],
                    column_maps[linear.kind],
                    linear.has_bias(config),
                    tuple(f"{layer_module(layer, norm)}.weight" for norm in linear.head_norms),
                    tuple(rows // config.head_dim for rows in linear.normed_rows(config)),
                    expert,
                )
        vocabulary_map = natural_rows(config.vocab_size)
        embedding = {EMBEDDING: config.vocab_size}
        head = embedding if config.tied_embeddings else {HEAD: config.vocab_size}
        self.add("head", 0, head, config.hidden_size, vocabulary_map)
        streamed_pages = self.page
        if not (config.tied_embeddings and self.matrices[-1].format.plain):
            self.add("embedding", 0, embedding, config.hidden_size, vocabulary_map)
        matrices = self.scaled()
        return TapeLayout(config, self.itemsize, self.formats, matrices, self.page, streamed_pages, self.constant)

    def scaled(self) -> tuple[Matrix, ...]:
        """The matrices, with places for what lies beside their pages, behind all other constants: page by page, as long as the
        format is the same; a router, which is plain among them, takes room too, so that pages are counted through."""
        placed: list[Matrix] = []
        body = format_of(self.formats.body, self.itemsize)
        for format, matrices in groupby(self.matrices, lambda m: body if m.kind == "router" else m.format):
            group = list(matrices)
            start = self.constants(sum(matrix.pages for matrix in group) * format.scale_words)
            for matrix in group:
                pages = matrix.first_page - group[0].first_page
                plain = matrix.format.plain
                placed.append(matrix if plain else replace(matrix, scale_offset=start + pages * format.scale_words))
        return tuple(placed)

    def add(
        self,
        kind: str,
        layer: int,
        modules: dict[str, int],
        columns: int,
        row_map: np.ndarray,
        column_map: np.ndarray | None = None,
        bias: bool = False,
        head_norms: tuple[str, ...] = (),
        head_norm_heads: tuple[int, ...] = (),
        expert: int = 0,
    ) -> None:
        """Append one matrix; `modules` are the linear modules whose rows it concatenates, with their row counts."""
        columns = columns if column_map is None else len(column_map)
        blocks = len(row_map) // BLOCK_ROWS
        plain = {"head": self.formats.head, "embedding": PLAIN.body, "router": PLAIN.body}
        format = format_of(plain.get(kind, self.formats.body), self.itemsize)
        pages_per_block = math.ceil(columns / format.columns)
        matrix = Matrix(
            kind=kind,
            layer=layer,
            blocks=blocks,
            pages_per_block=pages_per_block,
            first_page=self.page,
            columns=columns,
            row_map=row_map,
            column_map=column_map,
            sources=tuple(f"{module}.weight" for module in modules),
            source_rows=tuple(modules.values()),
            bias_sources=tuple(f"{module}.bias" for module in modules) if bias else (),
            bias_offset=self.constants(blocks * BLOCK_ROWS if bias else 0),
            head_norm_sources=head_norms,
            head_norm_heads=head_norm_heads,
            head_norm_offset=self.constants(sum(head_norm_heads) * self.config.padded_head_dim),
            format=format,
            scale_offset=-1,
            expert=expert,
        )
        self.matrices.append(matrix)
        self.page += matrix.pages

    def constants(self, count: int) -> int:
        """Where `count` further constants start; -1 for none."""
        start = self.constant
        self.constant += align_constants(count)
        return start if count else -1
