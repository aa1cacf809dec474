"""How prefill's kernels cut their work: tiles, splits, slots of shared memory.  Chosen from a model's sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from instructions.dimensions import ceil_div

STEP = 64  # columns of one step along K
CONSUMER_TOKENS = 64
RING_BYTES = 200 * 1024  # of shared memory, for the operands


@dataclass(frozen=True)
class Tiling:
    """One kernel's tiles: `tokens` tokens by `tile` rows of a matrix, `slots` steps along K ahead.

    The rest are a model's sizes: row blocks of the matrix, places of a token's sums of squares, query heads and elements
    of one as the queries are stored, elements from one token to the next in `normed` and `units`.
    """

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
class AttentionTiling:
    """Attention's tiles: `consumers` times 64 queries, by blocks of `keys` keys, `slots` blocks of keys or values ahead."""

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


@dataclass(frozen=True)
class Cut:
    """How a product is cut: tiles of `tokens` by `tile`, each in `split` parts along K."""

    tokens: int
    tile: int
    split: int


SHAPES = ((64, 64), (64, 128), (128, 128), (128, 256))  # of tiles: tokens by rows
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
STEP_CYCLES = 1.25 / 4096  # of a multiplication and addition on an SM's tensor cores, as they are fed in practice
BYTE_CYCLES = 1 / 26  # of a byte that an SM reads, from L2 with all others
TILE_CYCLES = 4000  # of beginning a tile and of finishing it
PART_CYCLES = 3000  # of leaving and adding a part


def choose_cut(tokens: int, rows: int, columns: int, sms: int) -> Cut:
    """The cut of a product of `tokens` tokens with a matrix [rows, columns] that should take the fewest cycles."""

    def cycles(cut: Cut) -> float:
        tiles = ceil_div(tokens, cut.tokens) * ceil_div(rows, cut.tile)
        steps = ceil_div(ceil_div(columns, STEP), cut.split)
        step = max(2 * cut.tokens * cut.tile * STEP * STEP_CYCLES, (cut.tokens + cut.tile) * STEP * 2 * BYTE_CYCLES)
        waves = ceil_div(tiles * cut.split, sms)
        return waves * (steps * step + TILE_CYCLES + (PART_CYCLES * cut.split**0.5 if cut.split > 1 else 0))

    splits = [split for split in SPLITS if split <= ceil_div(columns, STEP)]
    return min((Cut(*shape, split) for shape in SHAPES for split in splits), key=cycles)


def slots(tokens: int, tile: int) -> int:
    """Steps that fit the ring."""
    return min(8, RING_BYTES // ((tokens + tile) * STEP * 2))
