"""The numbers that every instruction may build on: a program's model, tiles, heads, cache pages.

Nothing here depends on the number of SMs, on a schedule, or on what instructions there are: `instructions.shape` adds
the activation buffers, which the instructions bring.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from models.config import ModelConfig
from models.formats import PLAIN, Formats
from models.tape import BLOCK_ROWS, PAGE_BYTES, TILE_BYTES, TILES_PER_PAGE, Matrix, TapeLayout

HELD_PAGES = 4  # most pages an instruction holds at once, so the shallowest ring that can run any program
MMA_COLUMNS = 8  # columns of the matrix instruction's B operand: up to 8 query heads, or 8 tokens, at the price of one


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Smallest power of two not below n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one decode program.

    `itemsize` is the size in bytes of what the matrices multiply, of the KV cache and of plain weights (2: bf16, 4: fp32),
    `formats` what the matrices are kept as; `capacity` the positions of the KV cache;
    `bucket` the most past positions a token may have under this program; `slices` the parts attention splits them into.
    `tail`: the program is the last layer and the head alone, from a hidden state that prefill left; else all of the token.
    `sequences` and `depth`: it decodes so many sequences at a time, of each so many positions one after another.  Each is a
    *column*: number `sequence * depth + place`.  Columns share the weights that are streamed, and nothing else.
    """

    config: ModelConfig
    itemsize: int
    capacity: int
    bucket: int
    slices: int
    tail: bool = False
    formats: Formats = PLAIN
    sequences: int = 1
    depth: int = 1

    @property
    def columns(self) -> int:
        """Tokens that a step computes."""
        return self.sequences * self.depth

    def columns_of(self, sequence: int) -> range:
        """The columns of one sequence."""
        return range(sequence * self.depth, (sequence + 1) * self.depth)

    @property
    def first_layer(self) -> int:
        """The layer that the program begins with."""
        return self.config.num_layers - 1 if self.tail else 0

    # -- the tape ---------------------------------------------------------------------------------------------------
    @cached_property
    def tape(self) -> TapeLayout:
        """Where every matrix lies on the weight tape."""
        return TapeLayout.from_config(self.config, self.itemsize, self.formats)

    def matrix(self, kind: str, layer: int = 0, expert: int = 0) -> Matrix:
        """One matrix of the tape: its row blocks, its pages, its bias."""
        return self.tape.matrix(kind, layer, expert)

    @property
    def tile_columns(self) -> int:
        """K columns in one 128-byte tile row."""
        return TILE_BYTES // self.itemsize

    @property
    def page_columns(self) -> int:
        """K columns in one page."""
        return TILES_PER_PAGE * self.tile_columns

    @property
    def page_elements(self) -> int:
        """Weights in one page."""
        return PAGE_BYTES // self.itemsize

    @property
    def logits_multiplier(self) -> float:
        """What the products of the head are multiplied by."""
        return 1.0 / self.config.logits_scaling

    # -- heads ------------------------------------------------------------------------------------------------------
    @property
    def head_rows(self) -> int:
        """Rows of one head, padded to whole row blocks."""
        return self.config.padded_head_dim

    @property
    def head_blocks(self) -> int:
        """Row blocks of one head."""
        return self.head_rows // BLOCK_ROWS

    @property
    def head_norms(self) -> bool:
        """Whether every head of queries and keys is normed."""
        return self.matrix("qkv").head_norm_offset >= 0

    @property
    def norms_together(self) -> bool:
        """Whether all queries are normed together, and all keys: of several heads, not each by itself."""
        return max(self.matrix("qkv").head_norm_heads, default=1) > 1

    @property
    def group_squares(self) -> int:
        """Sums of squares of the heads of one KV head's queries and of its keys, one a row block; none without norms."""
        return (self.config.group + 1) * self.head_blocks if self.head_norms else 0

    @property
    def group_rows(self) -> int:
        """Query rows that share one KV head."""
        return self.config.group * self.head_rows

    @property
    def partial_rows(self) -> int:
        """fp32 values one slice leaves per KV head: for each query head its maximum, its sum, its unnormalised output."""
        return self.config.group * (self.head_rows + 2)

    @property
    def all_partial_rows(self) -> int:
        """fp32 values that all slices of one layer leave in a column; none where there is but one slice."""
        return self.config.num_kv_heads * self.slices * self.partial_rows if self.slices > 1 else 0

    @property
    def group_columns(self) -> int:
        """Columns of the matrix instruction that the queries of one KV head take: a power of two, at least 8."""
        return max(MMA_COLUMNS, next_power_of_two(self.config.group))

    @property
    def attention_width(self) -> int:
        """Columns of a step that one attention instruction takes, all of one sequence: so many that their queries of a KV head
        fit one matrix instruction; where heads are normed all, since one instruction writes their keys to the cache."""
        if self.head_norms:
            return self.depth
        return min(self.depth, max(1, MMA_COLUMNS // next_power_of_two(self.config.group)))

    @property
    def attention_columns(self) -> int:
        """Columns of the matrix instruction that the queries of one KV head take, of all columns of a step that an attention
        instruction takes."""
        return max(MMA_COLUMNS, self.attention_width * next_power_of_two(self.config.group))

    @property
    def staged_queries(self) -> int:
        """Elements of one group's queries as attention stages them, padded to whole tiles and columns."""
        return self.attention_columns * self.head_tiles * self.tile_columns

    @property
    def query_rows(self) -> int:
        """Query rows of one layer."""
        return self.config.num_heads * self.head_rows

    @property
    def new_rows(self) -> int:
        """Key and value rows of one position in one layer."""
        return self.config.num_kv_heads * 2 * self.head_rows

    # -- the KV cache -----------------------------------------------------------------------------------------------
    @property
    def head_tiles(self) -> int:
        """128-byte tiles side by side that hold one position of one K or V head (a power of two)."""
        return next_power_of_two(ceil_div(self.head_rows * self.itemsize, TILE_BYTES))

    @property
    def page_positions(self) -> int:
        """Positions in one KV page."""
        return TILES_PER_PAGE * BLOCK_ROWS // self.head_tiles

    @property
    def head_pages(self) -> int:
        """KV pages that one K or V head of one layer owns."""
        return ceil_div(self.capacity, self.page_positions)

    @property
    def sequence_pages(self) -> int:
        """KV pages of one sequence."""
        return self.config.num_layers * self.config.num_kv_heads * 2 * self.head_pages

    @property
    def cache_pages(self) -> int:
        """KV pages of the whole cache."""
        return self.sequences * self.sequence_pages

    @property
    def slice_pages(self) -> int:
        """Most K pages (and as many V pages) that one attention slice streams under this program."""
        return ceil_div(ceil_div(self.bucket, self.page_positions), self.slices)

    def cache_page(self, layer: int, head: int, value: int, sequence: int = 0) -> int:
        """First page of a layer's K (value 0) or V (value 1) head, of one sequence."""
        place = (layer * self.config.num_kv_heads + head) * 2 + value
        return sequence * self.sequence_pages + place * self.head_pages

    def slice_range(self, index: int, past: int) -> tuple[int, int]:
        """Pages [first, stop) of a head that slice `index` attends to when `past` positions are cached."""
        pages = ceil_div(past, self.page_positions)
        share = ceil_div(pages, self.slices)
        first = min(index * share, pages)
        return first, min(first + share, pages)

    def usable(self, past: int, end: int) -> int:
        """How many columns of a sequence may hold tokens, the first with `past` positions before it, the last before `end`.

        None that would be sliced otherwise than the first: so a token's bits do not depend on which column computed it.
        """
        alike = ceil_div(ceil_div(past, self.page_positions), self.slices) * self.slices * self.page_positions
        return max(1, min(self.depth, alike - past + 1, end - past))
