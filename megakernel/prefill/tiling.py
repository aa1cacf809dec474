"""How prefill's kernels cut their work: tiles, splits, slots of shared memory.  Chosen from a model's sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from instructions.dimensions import ceil_div
from models.formats import WeightFormat

STEP = 64  # columns of one step along K
CONSUMER_TOKENS = 64
ROUTED = 32  # tokens that are routed to experts together
RING_BYTES = 200 * 1024  # of shared memory, for the operands


@dataclass(frozen=True)
class Tiling:
    """One kernel's tiles: `tokens` tokens by `tile` rows of a matrix, `slots` steps along K ahead.

    `kind` is what becomes of the product: "qkv", "gate_up", "residual" where it is added to that, or "single" where it is left.

    The rest are a model's sizes: row blocks of the matrix, places of a token's sums of squares, query heads and elements
    of one as the queries are stored, elements from one token to the next in `normed` and `units`.
    """

    kind: str
    tokens: int
    tile: int
    slots: int
    consumers: int
    blocks: int
    squares: int
    heads: int
    head: int
    normed: int
    units: int


@dataclass(frozen=True)
class Widening:
    """How a matrix is widened: its format, its blocks of 16 rows, pages of a block, and tiles of 64 columns that are wanted."""

    format: WeightFormat
    blocks: int
    pages: int
    tiles: int


@dataclass(frozen=True)
class AttentionTiling:
    """Attention's tiles: `consumers` times 64 queries, by blocks of `keys` keys, `slots` blocks of keys or values ahead.

    `parts`: in which a head's keys are shared by as many SMs.
    """

    consumers: int
    keys: int
    slots: int
    tiles: int
    pages: int
    page_positions: int
    width: int
    heads: int
    group: int
    kv_heads: int
    head_rows: int
    scale: float
    parts: int = 1


@dataclass(frozen=True)
class Cut:
    """How a product is cut: tiles of `tokens` by `tile`, each in `split` parts along K."""

    tokens: int
    tile: int
    split: int


SHAPES = ((64, 64), (64, 128), (128, 128), (128, 256))  # of tiles: tokens by rows
SPLITS = (1, 2, 3, 4, 8)
PRODUCTS = 4096 / 1.12  # multiplications and additions a cycle of an SM's tensor cores, as they are fed in practice
BURST_BYTES, L2_BYTES = 64, 40  # bytes a cycle that an SM reads from L2, for one tile and for many one after another
HBM_BYTES = 1800  # bytes a cycle that all read from memory
PART_BYTES = 20  # of parts that an SM writes and reads
KERNEL_CYCLES = 7000  # of beginning and ending a kernel
# Cycles an element of finishing a tile; the router's are taken for those of QKV.
FINISH = {"qkv": 0.5, "o": 0.65, "gate_up": 0.12, "down": 0.65, "router": 0.5}
PART_CYCLES = 6000  # of agreeing on who adds the parts


def choose_cut(kind: str, tokens: int, rows: int, columns: int, sms: int, least: int = 0) -> Cut:
    """The cut of a product of `tokens` tokens with a matrix [rows, columns] that should take the fewest cycles, in tiles of
    at least `least` rows.

    The model is fitted to measurements on an H100 (docs/notebook/prefill.md).
    """

    def cycles(cut: Cut) -> float:
        items = ceil_div(tokens, cut.tokens) * ceil_div(rows, cut.tile) * cut.split
        elements, steps = cut.tokens * cut.tile, ceil_div(ceil_div(columns, STEP), cut.split)
        waves = ceil_div(items, sms)
        bandwidth = BURST_BYTES if waves == 1 else L2_BYTES
        step = max(2 * elements * STEP / PRODUCTS, (cut.tokens + cut.tile) * STEP * 2 / bandwidth)
        adding = PART_CYCLES + elements * 4 * (1 + cut.split) / PART_BYTES if cut.split > 1 else 0
        working = waves * (steps * step + FINISH[kind] * elements + adding)
        return KERNEL_CYCLES + max(working, 2 * rows * columns / HBM_BYTES + adding)

    splits = [split for split in SPLITS if split <= ceil_div(columns, STEP)]
    return min((Cut(*shape, split) for shape in SHAPES if shape[1] >= least for split in splits), key=cycles)


def slots(tokens: int, tile: int) -> int:
    """Steps that fit the ring."""
    return min(8, RING_BYTES // ((tokens + tile) * STEP * 2))
