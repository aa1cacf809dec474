"""Inputs of the output and the down projection, of several columns: from who makes them straight to the tensor cores.

Who makes two neighbouring rows of a column rounds them to bf16 and stores them as one word, in the place where a lane takes it:
of every sixteen words of a column, the four that a lane multiplies by plain weights lie side by side, and those that it
multiplies by quantised ones do so in their order.  So a lane loads its part of two matrix instructions at once, every value is
rounded once instead of by each reader, and readers load half the bytes.  A word is VACANT until it is there, as an fp32 value
is: its halves are NaNs that rounding does not give.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, bits, block_layout, log2
from megakernel.device.numbers import largest_divisor
from megakernel.device.values import absent, any_missing, in_first_warp, look, look_again, put

GROUP = gl.constexpr(16)  # words of two matrix instructions of one column, whose places are shuffled where
SHUFFLED = gl.constexpr(2)  # so many columns of a word lie side by side in a lane
LANES = gl.constexpr(4)  # that share them
FEW = 2  # columns of a step
LONG = 8192  # columns of a row

PAIRED = gl.constexpr("""{
    .reg .b32 other, low, high;
    .reg .pred odd;
    shfl.sync.bfly.b32 other, $1, 4, 31, 0xffffffff;
    setp.ne.b32 odd, $2, 0;
    selp.b32 low, other, $1, odd;
    selp.b32 high, $1, other, odd;
    cvt.rn.bf16x2.f32 $0, high, low;
}""")


@gluon.constexpr_function
def words_layout(tiles, words, lane):
    """[tiles, words, columns] as they lie: where the tensor cores take them from, at least 16 bytes a lane side by side; `lane`
    columns of a tile in each lane."""
    shape, own = [tiles, words, MMA_COLUMNS.value], max(2, log2(lane) - 1)
    registers = bits(shape, 1, range(own)) + bits(shape, 1, range(own + 2, log2(words))) + bits(shape, 0, range(2, log2(tiles)))
    lanes = bits(shape, 1, range(own, own + 2)) + bits(shape, 2, range(3))
    return gl.DistributedLinearLayout(registers, lanes, bits(shape, 0, range(2)), [], shape)


@gluon.constexpr_function
def pages_together(pages, columns, longest, most):
    """Of so many pages those whose words are asked for at a time, at most so many: it pays for few columns, where the longest
    rows of the model are long (docs/notebook/columns.md)."""
    return largest_divisor(pages, most if columns <= FEW and longest > LONG else 1)


@gluon.jit
def place_of(F: gl.constexpr, word):
    """Where word `word` of a column lies that is multiplied by weights of format F, and which word lies there."""
    if F.LANE == SHUFFLED:
        place = word // GROUP * GROUP + word % LANES * LANES + word // LANES % LANES
    else:
        place = word
    return place


@gluon.jit
def words_of(even, odd):
    """Words of fp32 values and their neighbours, int32."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def paired(values, rows):
    """The words of accumulators of the matrix instruction, int32: with each fp32 value that of the neighbouring row, which the
    lane four further has, or four before; `rows` are the values' rows."""
    return gl.inline_asm_elementwise(PAIRED, "=r,f,r", [values, rows % 2], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def put_rows(S: gl.constexpr, step, target, distance: gl.constexpr, first, reader: gl.constexpr, values, known):
    """Store fp32 rows `first` to `first + 8` of all columns, [8, 8], of those that the matrix `reader` has columns for, where
    they are `known`; columns lie `distance` apart at `target`.  Every warp holds all of them."""
    LAYOUT: gl.constexpr = values.type.layout
    row = gl.arange(0, ROWS // 2, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, MMA_COLUMNS, gl.SliceLayout(0, LAYOUT))[None, :]
    inside = (row % 2 == 0) & (first + row < reader.columns) & (column < S.columns) & known
    target += column * distance + place_of(reader.format, (first + row) // 2)
    put(S, step, target, paired(values, row), inside & in_first_warp())


@gluon.jit
def page_of(S: gl.constexpr, source, page, distance: gl.constexpr, matrix: gl.constexpr):
    """Page `page` of the words at `source` as they are now, as fp32 [tiles, words, 8]: what is no word yet is VACANT."""
    F: gl.constexpr = matrix.format
    WORDS: gl.constexpr = F.COLUMNS // F.TILES // 2
    L: gl.constexpr = words_layout(F.TILES, WORDS, F.LANE)
    tile = gl.expand_dims(gl.arange(0, F.TILES, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None], 2)
    inner = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :], 2)
    column = gl.expand_dims(gl.arange(0, MMA_COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :], 1)
    place = (page * F.TILES + tile) * WORDS + inner
    if matrix.columns % (2 * GROUP) == 0:
        known = place < matrix.columns // 2
    else:
        known = 2 * place_of(F, place) < matrix.columns
    return look(source + place + column * distance, known & (column < S.columns))


@gluon.jit
def pages_of(S: gl.constexpr, source, first, COUNT: gl.constexpr, distance: gl.constexpr, matrix: gl.constexpr):
    """`page_of` COUNT pages from page `first` on."""
    words = ()
    for page in gl.static_range(COUNT):
        words += (page_of(S, source, first + page, distance, matrix),)
    return words


@gluon.jit
def absent_in(words, COUNT: gl.constexpr):
    """`absent`, of what `pages_of` saw."""
    missing = absent(words[0])
    for page in gl.static_range(1, COUNT):
        missing |= absent(words[page])
    return missing


@gluon.jit
def arrived(
    S: gl.constexpr,
    memory,
    step,
    begin,
    words,
    source,
    first,
    COUNT: gl.constexpr,
    distance: gl.constexpr,
    matrix: gl.constexpr,
):
    """What `pages_of` saw, looked for again until nothing is vacant."""
    waiting = any_missing(absent_in(words, COUNT))
    while waiting != 0:
        words = pages_of(S, source, first, COUNT, distance, matrix)
        waiting = look_again(memory, step, begin, absent_in(words, COUNT))
    return words


@gluon.jit
def operand_of(F: gl.constexpr, words):
    """A page's words as the B operand, bf16 [tiles, columns of a tile, 8]."""
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), F.LANE)
    TILES: gl.constexpr = words.shape[0]
    WORDS: gl.constexpr = words.shape[1]
    bits = words.to(gl.int32, bitcast=True)
    low = bits.to(gl.int16).to(gl.bfloat16, bitcast=True)
    high = (bits >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    if F.LANE == SHUFFLED:
        pairs = gl.reshape(gl.join(low, high), [TILES, WORDS // GROUP, LANES, GROUP // LANES, MMA_COLUMNS, 2])
        rows = gl.reshape(gl.permute(pairs, [0, 1, 3, 2, 5, 4]), [TILES, 2 * WORDS, MMA_COLUMNS])
    else:
        rows = gl.reshape(gl.permute(gl.join(low, high), [0, 1, 3, 2]), [TILES, 2 * WORDS, MMA_COLUMNS])
    return gl.convert_layout(rows, B, assert_trivial=True)
