"""How tiles lie in shared memory and in registers, for all formats."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.shape import MMA_COLUMNS as COLUMNS
from models.tape import BLOCK_ROWS

ROWS = gl.constexpr(BLOCK_ROWS)
MMA_COLUMNS = gl.constexpr(COLUMNS)
FLAT_TILES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
WORDS = gl.constexpr(2)  # consecutive 32-bit words of a row that a lane takes


@gluon.constexpr_function
def bits(shape, dimension, count):
    """Bases of a linear layout that count through the first bits of a dimension, from `count.start` to `count.stop`."""
    return [[1 << bit if at == dimension else 0 for at in range(len(shape))] for bit in count]


@gluon.constexpr_function
def log2(count):
    """Of a power of two."""
    return count.bit_length() - 1


@gluon.constexpr_function
def block_layout():
    """Accumulators of a row block, [tiles, 16 rows, 8 columns], the tiles spread over the warps."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def accumulators(tiles, columns):
    """`block_layout` as [tiles, 16 rows, how often, columns], of so many columns that repeat."""
    shape, own = [tiles, ROWS.value, MMA_COLUMNS.value // columns, columns], log2(columns)
    each = bits(shape, 3, range(own)) + bits(shape, 2, range(3 - own))
    registers = [each[0], *bits(shape, 1, range(3, 4)), *bits(shape, 0, range(2, log2(tiles)))]
    return gl.DistributedLinearLayout(registers, each[1:] + bits(shape, 1, range(3)), bits(shape, 0, range(2)), [], shape)


@gluon.constexpr_function
def staged(together, shape):
    """Staged bf16 values [columns] or [tiles, columns] where a lane holds `together` columns side by side of either half of an
    operand: what one instruction takes of both halves lies together, so that 16 bytes are the operands of two."""
    if together == 2:
        return gl.SwizzledSharedLayout(1, 1, 1, list(range(len(shape)))[::-1])
    columns = shape[-1]
    order = [1, 4 * together, 2, together, 2 * together]
    order += [1 << bit for bit in range(2, columns.bit_length() - 1) if 1 << bit not in order]
    if len(shape) == 1:
        bases = [[column] for column in order]
    else:
        bases = [[0, column] for column in order] + [[1 << bit, 0] for bit in range(shape[0].bit_length() - 1)]
    return gl.SharedLinearLayout(offset_bases=bases, block_bases=[], alignment=16)


@gluon.constexpr_function
def fragments(tiles, words):
    """A page of words [tiles, 16 rows, words] as `models.formats.base` orders them and TMA swizzles them: lanes take 16 bytes
    side by side."""
    bases = [(0, 0, 1), (0, 8, 0), (0, 0, 2), (0, 0, 4), (0, 1, 0), (0, 2, 0), (0, 4, 0)]  # two words, half block, lanes
    bases += [(0, 0, 1 << bit) for bit in range(3, words.bit_length() - 1)]
    bases += [(1 << bit, 0, 0) for bit in range(tiles.bit_length() - 1)]
    for bit in range(3):  # the line within eight is added to the number of the 16 bytes within a line, without carry
        bases[5 + bit] = tuple(a ^ b for a, b in zip(bases[5 + bit], bases[2 + bit], strict=True))
    return gl.SharedLinearLayout(offset_bases=[list(base) for base in bases], block_bases=[], alignment=1024)
