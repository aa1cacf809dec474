"""A quantised matrix as bf16, for the product that reads it: from the tape to a buffer, where its blocks of 16 rows lie as bf16
blocks of the tape do, tile after tile of 64 columns.

The first layer's matrices are widened by a kernel of their own, every other layer's along with the product of the layer before
it, by warps that have nothing else to do: each kind of matrix has two buffers, of which layers take turns.  Experts share one
buffer, to which those of a layer that have rows are widened before each of their products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import aggregate
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import BLOCK, K
from models.formats.base import PAGE_WORDS as WORDS

PAGE_WORDS = gl.constexpr(WORDS)
CHUNK_WORDS = gl.constexpr(128)  # of 16 rows, see `models.formats.base`
TILE_ELEMENTS = gl.constexpr(BLOCK.value * K.value)
UNIT_WORDS = gl.constexpr(1024)  # that a few warps load at once
UNITS = gl.constexpr(WORDS // UNIT_WORDS.value)  # of a page
WARPS = gl.constexpr(4)  # of the kernel


@aggregate
class Source:
    """A matrix on the tape, int32 words; what lies beside its pages, fp32; and memory for what it is widened to, bf16."""

    words: gl.tensor
    beside: gl.tensor
    out: gl.tensor


@gluon.jit
def make_source(tape, constants, widened, first_page, scales):
    """The matrix whose first page is that of the tape, and whose words beside the pages begin at `scales` in the constants."""
    return Source(tape + first_page.to(gl.int64) * PAGE_WORDS, constants + scales, widened)


@gluon.constexpr_function
def unit_columns(W):
    """Columns of 16 rows that a unit holds."""
    return W.format.value.COLUMNS.value * UNIT_WORDS.value // PAGE_WORDS.value


@gluon.constexpr_function
def words_layout(warps):
    """Consecutive words: to each thread 16 bytes of a chunk."""
    return gl.BlockedLayout([4], [32], [warps], [0])


@gluon.constexpr_function
def lines_layout(columns, warps):
    """A unit's columns as tiles of bf16, one after another: to each thread what its words widen to."""
    row_words = UNIT_WORDS.value // BLOCK.value
    own = (columns // row_words).bit_length()  # bits of the columns of two words

    def column(bit):
        place = 1 << bit
        return [place % K.value + place // K.value * TILE_ELEMENTS.value]

    rows = [[K.value << bit] for bit in range(3)]  # within half a block
    lanes = [column(own), column(own + 1), *rows]
    chunks = [column(bit) for bit in range(own + 2, columns.bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    registers = [*(column(bit) for bit in range(own)), [K.value << 3], *chunks[of_warps:]]
    return gl.DistributedLinearLayout(registers, lanes, chunks[:of_warps], [], [BLOCK.value * columns])


@gluon.jit
def load_unit(W: gl.constexpr, source, unit, units, N: gl.constexpr):
    """The words of a unit; nothing of columns that are not wanted, nor beyond so many units."""
    TILES: gl.constexpr = unit_columns(W) // K
    place = gl.arange(0, UNIT_WORDS, words_layout(N))
    first = unit % (W.pages * UNITS) * TILES
    known = (first + place // (UNIT_WORDS // TILES) < W.tiles) & (unit < units)
    return gl.load(source.words + unit.to(gl.int64) * UNIT_WORDS + place, mask=known, other=0)


@gluon.jit
def widen_unit(W: gl.constexpr, source, unit, words, N: gl.constexpr):
    """What a unit's words stand for, to its place."""
    COLUMNS: gl.constexpr = unit_columns(W)
    TILES: gl.constexpr = COLUMNS // K
    LINES: gl.constexpr = lines_layout(COLUMNS, N)
    pieces = gl.permute(gl.reshape(words, [UNIT_WORDS // CHUNK_WORDS, 8, 4, 2, 2]), [3, 1, 0, 2, 4])
    beside = source.beside + unit // UNITS * (W.format.BESIDE // 4)
    values = W.format.numbers(gl.reshape(pieces, [BLOCK, UNIT_WORDS // BLOCK]), beside, unit % UNITS * COLUMNS)
    lines = gl.reshape(gl.permute(gl.reshape(values, [BLOCK, TILES, K]), [1, 0, 2]), [BLOCK * COLUMNS])
    lines = gl.convert_layout(lines, LINES, assert_trivial=True)
    block, first = unit // (W.pages * UNITS), unit % (W.pages * UNITS) * TILES
    at = source.out + (block * W.tiles + first).to(gl.int64) * TILE_ELEMENTS
    place = gl.arange(0, BLOCK * COLUMNS, LINES)
    gl.store(at + place, lines, mask=first + place // TILE_ELEMENTS < W.tiles)


@gluon.jit
def widen(W: gl.constexpr, source, pages, N: gl.constexpr):
    """This program's units of so many pages, by N warps: one is loaded while the one before is widened."""
    units = pages * UNITS
    first = gl.program_id(0)
    words = load_unit(W, source, first, units, N)
    for unit in range(first, units, gl.num_programs(0)):
        following = load_unit(W, source, unit + gl.num_programs(0), units, N)
        widen_unit(W, source, unit, words, N)
        words = following


# Numbers on which nothing is specialised.
ARGUMENTS = ["first_page", "scales", "pages"]


@gluon.jit(do_not_specialize=ARGUMENTS)
def widen_matrix(tape, constants, widened, first_page, scales, pages, W: gl.constexpr):
    """One matrix: its first page on the tape, where the words beside that page lie in the constants, how many pages."""
    let_next_start()
    widen(W, make_source(tape, constants, widened, first_page, scales), pages, WARPS)
    wait_for_previous()


@gluon.jit(do_not_specialize=[*ARGUMENTS, "groups"])
def widen_experts(tape, constants, widened, ends, first_page, scales, pages, groups, W: gl.constexpr):
    """As `widen_matrix` does it, the matrices of `groups` experts, one behind another and of `pages` pages each: those of
    experts that have rows, of which ends[expert] is the end.  The others' places in the buffer stay as they are."""
    MATRIX: gl.constexpr = W.blocks * W.tiles * TILE_ELEMENTS
    let_next_start()
    wait_for_previous()
    begin = 0
    for expert in range(groups):
        end = gl.load(ends + expert)
        if end > begin:
            out = widened + gl.to_tensor(expert).to(gl.int64) * MATRIX
            place = expert * pages
            source = make_source(tape, constants, out, first_page + place, scales + place * (W.format.BESIDE // 4))
            widen(W, source, pages, WARPS)
        begin = end
