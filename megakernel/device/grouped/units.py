"""What becomes of a grouped product whose rows are gates and ups: units, which the next product takes.

A warp has 16 rows of an accumulator, one block of the tape: 8 gates and their 8 ups, and a thread both of a pair.  So SwiGLU
needs no exchange.  The row of x is multiplied with its number, a token's share of its expert, before it is rounded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.gate_up import swiglu
from megakernel.device.opaque import nothing
from megakernel.grouped.tiling import CONSUMER_ROWS, TILE_ROWS
from models.tape import HALF_BLOCK

HALF = gl.constexpr(HALF_BLOCK)
UNITS = gl.constexpr(CONSUMER_ROWS // 2)  # of a consumer
TILE_UNITS = gl.constexpr(TILE_ROWS // 2)
# [32, tokens]: to each thread 8 units of a token, 16 bytes, and to 4 threads all 32
STORED = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1]))


@gluon.constexpr_function
def staged_units():
    """Units of tokens in shared memory, those of a token side by side."""
    return gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2, transposed=True)


@gluon.jit
def row_pairs(acc):
    """Rows 0 to 7 and rows 8 to 15 of each block of a tile [64, tokens], element for element beside each other: two
    [4, 8, tokens]."""
    blocks: gl.constexpr = acc.shape[0] // (2 * HALF)
    tokens: gl.constexpr = acc.shape[1]
    return gl.split(gl.permute(gl.reshape(acc, [blocks, 2, HALF, tokens]), [0, 2, 3, 1]))


@gluon.jit
def keep_units(out, work, staged, item, acc, FIRST: gl.constexpr, WHO: gl.constexpr):
    """Store the units of a tile's tokens from number `FIRST` on, those that the tile has; `acc` is [64, tokens]."""
    TOKENS: gl.constexpr = acc.shape[1]
    gate, up = row_pairs(acc)
    here = FIRST + nothing()  # or what is made of it would be kept in registers through the products
    mine = here + gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(1, gate.type.layout)))
    share = gl.load(out.x_scale + item.start + mine, mask=mine < item.count, other=0.0)
    room = staged.slice(0, TOKENS, dim=1)
    room.store(gl.reshape((swiglu(gate, up) * share[None, None, :]).to(gl.bfloat16), [UNITS, TOKENS]))
    values = room.load(STORED)
    units = item.column * TILE_UNITS + WHO * UNITS + gl.arange(0, UNITS, gl.SliceLayout(1, STORED))[:, None]
    tokens = here + gl.arange(0, TOKENS, gl.SliceLayout(0, STORED))[None, :]
    place = out.y + item.start.to(gl.int64) * out.stride + (tokens * out.stride + units)
    gl.store(place, values, mask=(tokens < item.count) & (units < work.n // 2))
