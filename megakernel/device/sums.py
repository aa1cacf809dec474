"""The sum of a row block over the warps, each of which has multiplied tiles of its own.

The warps leave their parts in shared memory and meet once; then every thread loads the parts of its own rows and adds them up,
all warps' threads the same.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import barrier, reinterpret
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS

WARP_VALUES = gl.constexpr(128)  # of a vector, side by side: four of each thread
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PAIRS = gl.constexpr(MMA_COLUMNS.value // 2)  # of columns: a thread holds both of one


@gluon.constexpr_function
def width(columns):
    """Columns of a row block's result, of a step of so many: those of one are equal, so a thread holds one of a pair."""
    return MMA_COLUMNS.value if columns > 1 else PAIRS.value


@gluon.constexpr_function
def left_layout(columns):
    """The parts of four warps in shared memory, [warps, 16 rows, `width`], without bank conflicts: what a thread stores lies
    side by side, and of one column what two warps store of the first pair, before all other pairs."""
    if columns > 1:
        bases = [[0, 0, 1], [0, 8, 0], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0]]
    else:
        bases = [[0, 8, 0], [1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0], [2, 0, 0], [1, 0, 1], [0, 4, 2]]
    return gl.SharedLinearLayout(offset_bases=bases, block_bases=[], alignment=16)


@gluon.constexpr_function
def first_layout():
    """The first pair's in `left_layout` of one column, [warps, 16 rows]."""
    bases = [[0, 8], [1, 0], [0, 1], [0, 2], [0, 4], [2, 0]]
    return gl.SharedLinearLayout(offset_bases=bases, block_bases=[], alignment=16)


@gluon.constexpr_function
def taken_layout(columns):
    """[warps, 16 rows, `width`] in registers: every warp holds all, a thread all parts of what it holds of accumulators."""
    first = [[0, 0, 1]] if columns > 1 else []
    pair = len(first) + 1
    lanes = [[0, 0, pair], [0, 0, 2 * pair], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    registers = [*first, [0, 8, 0], [1, 0, 0], [2, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, 0], [0, 0, 0]], [], [4, ROWS.value, width(columns)])


@gluon.constexpr_function
def result_layout(columns):
    """Layout of a row block's result, [16 rows, `width`], of a step of so many columns; every warp holds all of it."""
    return gl.SliceLayout(0, taken_layout(columns))


@gluon.jit
def make_places(S: gl.constexpr, COUNT: gl.constexpr):
    """Shared memory for the warps' parts of COUNT row blocks."""
    SHAPE: gl.constexpr = [COUNT, gl.num_warps(), ROWS, width(S.columns)]
    return gl.allocate_shared_memory(gl.float32, SHAPE, left_layout(S.columns))


@gluon.jit
def parts_of(tiles):
    """The sums of each warp's own tiles, of fp32 [tiles, 16 rows, 8 columns]: [warps, 16 rows, 8 columns]."""
    WARPS: gl.constexpr = gl.num_warps()
    return gl.sum(gl.reshape(tiles, [tiles.shape[0] // WARPS, WARPS, ROWS, MMA_COLUMNS]), axis=0)


@gluon.jit
def leave(S: gl.constexpr, places, number, parts):
    """Leave what `parts_of` returns in place `number`; a barrier must come before it is taken."""
    if S.columns == 1:
        parts, _ = gl.split(gl.reshape(parts, [gl.num_warps(), ROWS, PAIRS, 2]))
    places.index(number).store(parts)


@gluon.jit
def take(S: gl.constexpr, places, number):
    """The parts in place `number`, fp32 [warps, 16 rows, 8 columns]; of one column [warps, 16 rows]."""
    if S.columns == 1:
        COUNT: gl.constexpr = places.shape[0] * PAIRS
        first = reinterpret(places, gl.float32, [COUNT, gl.num_warps(), ROWS], first_layout()).index(number * PAIRS)
        parts = first.load(gl.SliceLayout(2, taken_layout(1)))
    else:
        parts = places.index(number).load(taken_layout(S.columns))
    return parts


@gluon.jit
def result_of(S: gl.constexpr, total):
    """What `take` returns, summed over the warps, as fp32 [16 rows, `width`] in `result_layout`."""
    RESULT: gl.constexpr = result_layout(S.columns)
    if S.columns == 1:
        rows = gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, RESULT), assert_trivial=True), 1)
        result, _ = gl.broadcast(rows, gl.zeros([ROWS, width(S.columns)], gl.float32, RESULT))
    else:
        result = gl.convert_layout(total, RESULT, assert_trivial=True)
    return result


@gluon.jit
def sum_of(S: gl.constexpr, tiles):
    """The sum of tiles, fp32 [tiles, 16 rows, 8 columns], over all of them, as `result_of` has it; of the warps' parts those
    two apart come first."""
    places = make_places(S, 1)
    leave(S, places, 0, parts_of(tiles))
    barrier()
    return result_of(S, in_pairs(take(S, places, 0)))


@gluon.jit
def in_pairs(parts):
    """The sum of four warps' parts over dimension 0, those two apart first."""
    pairs = gl.sum(gl.reshape(parts, [2, 2] + parts.shape[1:]), axis=0)
    return gl.sum(pairs, axis=0)


@gluon.jit
def of_warps(values):
    """A vector that lies as `vector_layout` says as [warps, values of each]."""
    WARPS: gl.constexpr = gl.num_warps()
    ROUNDS: gl.constexpr = values.shape[0] // (WARPS * WARP_VALUES)
    apart = gl.permute(gl.reshape(values, [ROUNDS, WARPS, WARP_VALUES]), [1, 0, 2])
    return gl.reshape(apart, [WARPS, ROUNDS * WARP_VALUES])


@gluon.jit
def shared_by_warps(parts):
    """A number of each warp, [warps], in every thread; also a barrier."""
    WARPS: gl.constexpr = gl.num_warps()
    place = gl.allocate_shared_memory(parts.dtype, [WARPS], FLAT)
    place.store(parts)
    barrier()
    return place.load(gl.BlockedLayout([WARPS], [32], [WARPS], [0]))


@gluon.jit
def sum_of_vector(values):
    """The sum of fp32 values that lie as `vector_layout` says, bit for bit that of `gl.sum`, but the warps meet once."""
    return in_pairs(shared_by_warps(gl.sum(of_warps(values), axis=1)))


@gluon.jit
def any_of_vector(values):
    """Whether any of int32 values is not 0, int32, the same for all threads; the warps of `vector_layout` meet once."""
    return gl.reduce_or(shared_by_warps(gl.reduce_or(of_warps(values), axis=1)), axis=0)
