"""The input of a matrix, of several columns, normed and staged in shared memory.

Every column's numbers are those that it would have alone, bit for bit: sums go in the same order.  Staged are as many columns
as there are, or the next power of two; the columns of the matrix instruction beyond them repeat them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, bits, block_layout, log2
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
def columns_together(size, columns):
    """How many of so many staged columns, of so many values each, are normed at a time."""
    return max(1, min(columns, HELD.value // size))


@gluon.constexpr_function
def repeated_layout(tiles, tile, lane, columns):
    """[tiles, columns of a tile, how often, staged columns]: the B operand, whose 8 columns repeat the staged ones; in a lane
    `lane` columns of a tile lie side by side."""
    shape, own, kept = [tiles, tile, MMA_COLUMNS.value // columns, columns], log2(lane), log2(columns)
    registers = bits(shape, 1, range(own)) + bits(shape, 1, range(own + 2, log2(tile))) + bits(shape, 0, range(2, log2(tiles)))
    lanes = bits(shape, 1, range(own, own + 2)) + bits(shape, 3, range(kept)) + bits(shape, 2, range(3 - kept))
    return gl.DistributedLinearLayout(registers, lanes, bits(shape, 0, range(2)), [], shape)


@gluon.constexpr_function
def blocks_looked_for(count):
    """Row blocks of so many values, as many as the consumer has threads at least: no two of them look for the same."""
    return max(128, power_of_two(-(-count // ROWS.value)))


@gluon.jit
def staged_tiles(ring, SIZE: gl.constexpr, TILES: gl.constexpr, TILE: gl.constexpr, STAGED_COLUMNS: gl.constexpr, index):
    """The staging memory as vectors of SIZE values, of which `index` is one: [tiles, STAGED_COLUMNS, columns of a tile]."""
    COUNT: gl.constexpr = ring.staging.shape[0] * ring.staging.shape[1] // (SIZE * STAGED_COLUMNS)
    return reinterpret(ring.staging, gl.bfloat16, [COUNT, TILES, STAGED_COLUMNS, TILE], STAGED_LAYOUT).index(index)


@gluon.jit
def staged_page(S: gl.constexpr, F: gl.constexpr, ring, page):
    """Page `page` of the staged columns as the B operand, [tiles, columns of a tile, 8]."""
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), F.LANE)
    TILE: gl.constexpr = F.COLUMNS // F.TILES
    STAGED_COLUMNS: gl.constexpr = power_of_two(S.columns)
    FULL: gl.constexpr = repeated_layout(F.TILES, TILE, F.LANE, STAGED_COLUMNS)
    SHAPE: gl.constexpr = [F.TILES, TILE, MMA_COLUMNS // STAGED_COLUMNS, STAGED_COLUMNS]
    tiles = staged_tiles(ring, F.COLUMNS, F.TILES, TILE, STAGED_COLUMNS, page).permute([0, 2, 1])
    x = gl.expand_dims(tiles.load(gl.SliceLayout(2, FULL)), 2)
    x, _ = gl.broadcast(x, gl.zeros(SHAPE, gl.bfloat16, FULL))
    return gl.convert_layout(gl.reshape(x, [F.TILES, TILE, MMA_COLUMNS]), B, assert_trivial=True)


@gluon.jit
def activation_of(S: gl.constexpr, F: gl.constexpr, ring, page):
    """Page `page` of what is staged, of one column or several, as a format multiplies it."""
    if S.columns == 1:
        x = F.activation(S, ring, page)
    else:
        x = F.with_staged(S, ring, page, staged_page(S, F, ring, page))
    return x


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
    STAGED_COLUMNS: gl.constexpr = power_of_two(S.columns)
    L: gl.constexpr = norm_layout()
    TOGETHER: gl.constexpr = columns_together(SIZE, STAGED_COLUMNS)
    index = gl.arange(0, SIZE, gl.SliceLayout(0, L))
    column = gl.arange(0, TOGETHER, gl.SliceLayout(1, L))
    if TOGETHER == STAGED_COLUMNS:
        w = gl.load(weight + index, mask=index < COUNT, other=0.0)
        wait_made(S, memory, step, source, distance, COUNT)
        x, squares = squares_of(S, memory, step, source, distance, COUNT, column, index)
        scale = gl.rsqrt(squares / COUNT + S.epsilon)
        y = (x * scale[:, None] * w[None, :]).to(gl.bfloat16)
        tiles = gl.permute(gl.reshape(y, [STAGED_COLUMNS, SIZE // TILE, TILE]), [1, 0, 2])
        staged_tiles(ring, SIZE, SIZE // TILE, TILE, STAGED_COLUMNS, 0).store(tiles)
        F.stage_columns(S, ring, 0, y)
    else:
        wait_made(S, memory, step, source, distance, COUNT)
        every = gl.arange(0, STAGED_COLUMNS, gl.SliceLayout(1, L))
        scales = gl.zeros([STAGED_COLUMNS], gl.float32, gl.SliceLayout(1, L))
        for first in gl.static_range(0, STAGED_COLUMNS, TOGETHER):
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
            tiles = gl.permute(gl.reshape(y, [STAGED_COLUMNS, F.TILES, TILE]), [1, 0, 2])
            staged_tiles(ring, F.COLUMNS, F.TILES, TILE, STAGED_COLUMNS, page).store(tiles)
            F.stage_columns(S, ring, page, y)
    barrier()
    stamp(S, step.trace, STAGED)
