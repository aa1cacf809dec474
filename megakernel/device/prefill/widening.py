"""A quantised matrix as bf16, just before the product that reads it: from the tape to a buffer, where its blocks of 16 rows lie
as bf16 blocks of the tape do, tile after tile of 64 columns.

The kernel does not wait before it writes, so that it takes the SMs that the kernel before it no longer needs.  What it writes
over was read two products ago: that product has ended, because the one between lets this kernel start only when it has itself
waited (`read_product`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import BLOCK, K
from models.formats.base import PAGE_WORDS as WORDS
from models.formats.base import ROW_WORDS as OF_ROW

PAGE_WORDS = gl.constexpr(WORDS)
ROW_WORDS = gl.constexpr(OF_ROW)
CHUNKS = gl.constexpr(32)  # of a page, see `models.formats.base`
TILE_ELEMENTS = gl.constexpr(BLOCK.value * K.value)


@gluon.constexpr_function
def page_tiles(columns):
    """Tiles of 64 columns in a page of so many."""
    return columns // K.value


@gluon.constexpr_function
def lines_layout(columns):
    """A page of `columns` columns as tiles of bf16, one after another: to each thread what the 16 bytes widen to that it loads
    of each chunk."""
    codes = columns // ROW_WORDS.value  # of a word
    row_bits = [[K.value << bit] for bit in range(3)]  # the row within half a block
    half = [K.value << 3]

    def column(bit):
        place = 1 << bit
        return [place % K.value + place // K.value * TILE_ELEMENTS.value]

    own = codes.bit_length()  # bits of the columns of two words
    within = [column(bit) for bit in range(own)]
    lanes = [column(own), column(own + 1), *row_bits]
    chunks = [column(bit) for bit in range(own + 2, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout([*within, half, *chunks[2:]], lanes, chunks[:2], [], [BLOCK.value * columns])


@gluon.jit
def widen_page(W: gl.constexpr, tape, beside, out, page):
    """Page number `page` of the matrix."""
    COLUMNS: gl.constexpr = W.format.COLUMNS
    TILES: gl.constexpr = page_tiles(COLUMNS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    LINES: gl.constexpr = lines_layout(COLUMNS)
    block, first = page // W.pages, page % W.pages * TILES
    place = gl.arange(0, PAGE_WORDS, LAYOUT)
    known = first + place // (PAGE_WORDS // TILES) < W.tiles
    words = gl.load(tape + page.to(gl.int64) * PAGE_WORDS + place, mask=known, other=0)
    pieces = gl.permute(gl.reshape(words, [CHUNKS, 8, 4, 2, 2]), [3, 1, 0, 2, 4])  # half block, row, chunk, lane, word
    values = W.format.numbers(gl.reshape(pieces, [BLOCK, ROW_WORDS]), beside + page * (W.format.BESIDE // 4))
    lines = gl.reshape(gl.permute(gl.reshape(values, [BLOCK, TILES, K]), [1, 0, 2]), [BLOCK * COLUMNS])
    lines = gl.convert_layout(lines, LINES, assert_trivial=True)
    place = gl.arange(0, BLOCK * COLUMNS, LINES)
    at = out + (block * W.tiles + first).to(gl.int64) * TILE_ELEMENTS
    gl.store(at + place, lines, mask=first + place // TILE_ELEMENTS < W.tiles)


# Numbers on which nothing is specialised.
ARGUMENTS = ["first_page", "scales"]


@gluon.jit(do_not_specialize=ARGUMENTS)
def widen_matrix(tape, constants, widened, first_page, scales, W: gl.constexpr):
    """One matrix: its first page on the tape, int32 words, and where the words beside that page lie in the constants."""
    let_next_start()
    tape += first_page.to(gl.int64) * PAGE_WORDS
    for page in range(gl.program_id(0), W.blocks * W.pages, gl.num_programs(0)):
        widen_page(W, tape, constants + scales, widened, page)
    wait_for_previous()
