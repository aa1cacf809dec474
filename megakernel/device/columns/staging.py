"""The input of a matrix, of several columns, normed and staged in shared memory.

Every column's numbers are those that it would have alone, bit for bit: sums go in the same order.  Rows of the matrix
instruction that hold no column are zeros.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, block_layout
from megakernel.device.numbers import power_of_two
from megakernel.device.sync import wait_all
from megakernel.device.trace import STAGED, stamp
from megakernel.device.values import absent, any_missing, look, look_again, vacant

STAGED_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))  # [tiles, columns, columns of a tile]
HELD = gl.constexpr(16384)  # values in registers at a time: 128 of each of the consumer's threads


@gluon.constexpr_function
def norm_layout():
    """[columns, values]: of every column a thread holds what it would hold of one alone."""
    return gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])


@gluon.constexpr_function
def columns_together(size):
    """How many columns of so many values are normed at a time."""
    return max(1, min(MMA_COLUMNS.value, HELD.value // size))


@gluon.constexpr_function
def blocks_looked_for(count):
    """Row blocks of so many values, as many as the consumer has threads at least: no two of them look for the same."""
    return max(128, power_of_two(-(-count // ROWS.value)))


@gluon.jit
def staged_tiles(ring, COLUMNS: gl.constexpr, TILE: gl.constexpr):
    """The staging memory as tiles of all columns, [1, tiles, 8, columns of a tile]."""
    return reinterpret(ring.staging, gl.bfloat16, [1, COLUMNS // TILE, MMA_COLUMNS, TILE], STAGED_LAYOUT).index(0)


@gluon.jit
def staged_page(F: gl.constexpr, ring, page):
    """Page `page` of the staged columns as the B operand, [tiles, columns of a tile, 8]."""
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), F.LANE)
    TILE: gl.constexpr = F.COLUMNS // F.TILES
    PAGES: gl.constexpr = ring.staging.shape[0] * ring.staging.shape[1] // (F.COLUMNS * MMA_COLUMNS)
    tiles = reinterpret(ring.staging, gl.bfloat16, [PAGES, F.TILES, MMA_COLUMNS, TILE], STAGED_LAYOUT).index(page)
    return tiles.permute([0, 2, 1]).load(B)


@gluon.jit
def look_columns(S: gl.constexpr, source, distance: gl.constexpr, COUNT: gl.constexpr, column, index):
    """The vectors of some columns, `distance` apart, as they are now, fp32 [columns, values]; zeros where there are none."""
    known = (column < S.columns)[:, None] & (index < COUNT)[None, :]
    return look(source + column[:, None] * distance + index[None, :], known)


@gluon.jit
def await_row_blocks(S: gl.constexpr, memory, step, source, distance: gl.constexpr, COUNT: gl.constexpr):
    """Look for one value of each row block that the vectors were made in until none is vacant: of others some still may be, but
    those few looks find out when one at all of them is worth while."""
    BLOCKS: gl.constexpr = blocks_looked_for(COUNT)
    block = gl.arange(0, BLOCKS, gl.BlockedLayout([1], [32], [4], [0]))
    place = source + (S.columns - 1) * distance + gl.minimum(block * ROWS + ROWS - 1, COUNT - 1)
    seen = look(place, block * ROWS < COUNT)
    begin = cycles()
    waiting = any_missing(vacant(seen))
    while waiting != 0:
        seen = look(place, block * ROWS < COUNT)
        waiting = look_again(memory, step, begin, vacant(seen))


@gluon.jit
def wait_made(S: gl.constexpr, memory, step, source, distance: gl.constexpr, COUNT: gl.constexpr):
    """Wait for every signal, and of one sequence for a value of every row block (of several that takes longer): of so many
    values some would be vacant otherwise, and all are loaded again then."""
    wait_all(S, memory, step)
    if S.sequences == 1:
        await_row_blocks(S, memory, step, source, distance, COUNT)


@gluon.jit
def squares_of(S: gl.constexpr, memory, step, source, distance: gl.constexpr, COUNT: gl.constexpr, column, index):
    """Vectors [columns, values] as soon as all of them are there, and the sum of squares of each."""
    x = look_columns(S, source, distance, COUNT, column, index)
    squares = gl.sum(x * x, axis=1)
    if gl.max((squares != squares).to(gl.int32), axis=0) != 0:  # not a number, as a vacant place is none
        begin, waiting = cycles(), 1
        while waiting != 0:
            waiting = look_again(memory, step, begin, absent(x))
            if waiting != 0:  # it is 1; but so the compiler does not keep all places for this rare case
                x = look_columns(S, source + (waiting - 1), distance, COUNT, column, index)
        squares = gl.sum(x * x, axis=1)
    return x, squares


@gluon.jit
def stage_norms(
    S: gl.constexpr, memory, ring, step, source, distance: gl.constexpr, weight, matrix: gl.constexpr, SIZE: gl.constexpr
):
    """`megakernel.device.matvec.stage_norm` for all columns, `distance` from one to the next."""
    F: gl.constexpr = matrix.format
    TILE: gl.constexpr = F.COLUMNS // F.TILES
    COUNT: gl.constexpr = matrix.columns
    L: gl.constexpr = norm_layout()
    TOGETHER: gl.constexpr = columns_together(SIZE)
    index = gl.arange(0, SIZE, gl.SliceLayout(0, L))
    column = gl.arange(0, TOGETHER, gl.SliceLayout(1, L))
    if TOGETHER == MMA_COLUMNS:
        w = gl.load(weight + index, mask=index < COUNT, other=0.0)
        wait_made(S, memory, step, source, distance, COUNT)
        x, squares = squares_of(S, memory, step, source, distance, COUNT, column, index)
        scale = gl.rsqrt(squares / COUNT + S.epsilon)
        y = (x * scale[:, None] * w[None, :]).to(gl.bfloat16)
        tiles = gl.permute(gl.reshape(y, [MMA_COLUMNS, SIZE // TILE, TILE]), [1, 0, 2])
        staged_tiles(ring, SIZE, TILE).store(tiles)
    else:
        wait_made(S, memory, step, source, distance, COUNT)
        every = gl.arange(0, MMA_COLUMNS, gl.SliceLayout(1, L))
        scales = gl.zeros([MMA_COLUMNS], gl.float32, gl.SliceLayout(1, L))
        for first in gl.static_range(0, MMA_COLUMNS, TOGETHER):
            if first < S.columns:
                _, squares = squares_of(S, memory, step, source, distance, COUNT, first + column, index)
                scale = gl.rsqrt(squares / COUNT + S.epsilon)
                for j in gl.static_range(TOGETHER):
                    own = gl.sum(gl.where(column == j, scale, 0.0), axis=0)
                    scales = gl.where(every == first + j, own, scales)
        part = gl.arange(0, F.COLUMNS, gl.SliceLayout(0, L))
        for page in range(matrix.pages):
            at = page * F.COLUMNS + part
            w = gl.load(weight + at, mask=at < COUNT, other=0.0)
            known = (every < S.columns)[:, None] & (at < COUNT)[None, :]
            x = gl.load(source + every[:, None] * distance + at[None, :], mask=known, other=0.0, cache_modifier=".cg")
            y = (x * scales[:, None] * w[None, :]).to(gl.bfloat16)
            tiles = gl.permute(gl.reshape(y, [MMA_COLUMNS, F.TILES, TILE]), [1, 0, 2])
            PAGES: gl.constexpr = ring.staging.shape[0] * ring.staging.shape[1] // (F.COLUMNS * MMA_COLUMNS)
            reinterpret(ring.staging, gl.bfloat16, [PAGES, F.TILES, MMA_COLUMNS, TILE], STAGED_LAYOUT).index(page).store(tiles)
    barrier()
    stamp(S, step.trace, STAGED)
