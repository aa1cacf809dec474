"""Pieces of a finished tile, and how they come from the tensor cores' layout to lines of memory.

A thread has two neighbouring columns of an accumulator, so what it stored itself would be 8 bytes of a line, of eight lines
an instruction.  A piece goes through shared memory instead, after which neighbouring threads have a line between them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import reinterpret
from megakernel.device.prefill.product import ROWS

PIECE = gl.constexpr(64)  # columns of a tile that are finished together, so that they fit the registers
UNITS_PIECE = gl.constexpr(2 * PIECE.value)  # of gates and ups, which are half as many units
PASSES = gl.constexpr(8)  # in which a consumer's threads go over a piece of fp32,
TOGETHER = gl.constexpr(ROWS.value // PASSES.value)  # so many rows at once, 16 threads each
# [64, 64] of fp32 in shared memory, as threads take it from there, and the same as [passes, rows, columns]
STAGED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
TAKEN = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
LINES = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 2, 16], [1, 4, 1], [2, 1, 0]))


@gluon.constexpr_function
def staged_narrow(columns):
    """[64, columns] of bf16 in shared memory,"""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def narrow_lines(columns):
    """and as threads take it from there: 16 bytes each."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def make_rooms(CONSUMERS: gl.constexpr):
    """Shared memory for a piece of each consumer."""
    return gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS, PIECE], STAGED)


@gluon.jit
def column_halves(acc):
    """The left and the right half of a tile's columns."""
    tokens: gl.constexpr = acc.shape[0]
    width: gl.constexpr = acc.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(acc, [tokens, 2, width]), [0, 2, 1]))


@gluon.jit
def piece_of(acc, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """`WIDTH` columns of a tile, a power of two, from one of their multiples on."""
    if acc.shape[1] == WIDTH:
        return acc
    else:
        left, right = column_halves(acc)
        if acc.shape[1] // 2 > FIRST:
            return piece_of(left, FIRST, WIDTH)
        else:
            return piece_of(right, FIRST - acc.shape[1] // 2, WIDTH)


@gluon.jit
def by_lines(room, values):
    """fp32 [64, 64] of an accumulator's layout as [8, 8, 64] in that of `LINES`."""
    room.store(values)
    taken = gl.reshape(room.load(TAKEN), [PASSES, TOGETHER, PIECE])
    return gl.convert_layout(taken, LINES, assert_trivial=True)


@gluon.jit
def line_rows():
    """[1, 8, 1]: rows of the first pass."""
    return gl.arange(0, TOGETHER, gl.SliceLayout(0, gl.SliceLayout(2, LINES)))[None, :, None]


@gluon.jit
def later_rows():
    """[8, 1, 1]: how much later those of each pass are.  A thread knows them when it is compiled."""
    return gl.arange(0, PASSES, gl.SliceLayout(1, gl.SliceLayout(2, LINES)))[:, None, None] * TOGETHER


@gluon.jit
def summed_rows():
    """[8, 8]: rows of what is summed along a piece's columns."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, LINES)
    later = gl.arange(0, PASSES, gl.SliceLayout(1, LAYOUT))[:, None] * TOGETHER
    return later + gl.arange(0, TOGETHER, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def line_columns():
    """[1, 1, 64]."""
    return gl.arange(0, PIECE, gl.SliceLayout(0, gl.SliceLayout(1, LINES)))[None, None, :]


@gluon.jit
def narrow_by_lines(room, values):
    """bf16 [64, columns], at most 64, of any layout, with 8 columns a thread."""
    columns: gl.constexpr = values.shape[1]
    narrow = reinterpret(room, gl.bfloat16, [ROWS, columns], staged_narrow(columns))
    narrow.store(values)
    return narrow.load(narrow_lines(columns))
