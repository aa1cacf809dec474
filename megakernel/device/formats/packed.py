"""What formats share whose weights are widened in registers: pages as words, and what lies beside them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import copy_page, reinterpret
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, WORDS, block_layout, fragments, staged
from megakernel.geometry import BOX_WORDS, ITEM_BYTES, STAGING_BYTES

UNIT = gl.constexpr(STAGING_BYTES)
ITEM = gl.constexpr(ITEM_BYTES)
BOX = gl.constexpr(BOX_WORDS)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def page_activation(ring, page, TILES: gl.constexpr, COLUMNS: gl.constexpr, TOGETHER: gl.constexpr):
    """Page `page` of the staged vector, the same bf16 values in all columns: [tiles, columns of a tile, 8]; a lane holds
    TOGETHER columns side by side."""
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), TOGETHER)
    PAGES: gl.constexpr = ring.staging.shape[0] * (UNIT // ITEM) // (TILES * COLUMNS)
    tiles = reinterpret(ring.staging, gl.bfloat16, [PAGES, TILES, COLUMNS], staged(TOGETHER, [TILES, COLUMNS])).index(page)
    x = gl.expand_dims(tiles.load(gl.SliceLayout(2, B)), 2)
    x, _ = gl.broadcast(x, gl.zeros([TILES, COLUMNS, MMA_COLUMNS], gl.bfloat16, B))
    return x


@gluon.jit
def four_values(words, WIDEN: gl.constexpr):
    """Words of four codes as bf16, columns in order, by instructions that take two words at a time, into registers of two
    columns."""
    r0, r1, r2, r3 = gl.inline_asm_elementwise(
        WIDEN,
        "=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    registers = gl.reshape(gl.join(gl.join(r0, r2), gl.join(r1, r3)), [words.numel // 2, 2, 2, 2])
    return gl.permute(registers, [0, 2, 3, 1])


@gluon.jit
def operand(values, TILES: gl.constexpr, TILE: gl.constexpr, LANE: gl.constexpr):
    """Widened words as the A operand, [tiles, 16 rows, columns of a tile], of which a lane holds LANE columns side by side."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), LANE)
    return gl.convert_layout(gl.reshape(values, [TILES, ROWS, TILE]), A, assert_trivial=True)


@gluon.jit
def page_words(ring, slot, TILES: gl.constexpr, COUNT: gl.constexpr):
    """The page in a slot, int32 [tiles, 16 rows, words]."""
    A: gl.constexpr = gl.DotOperandLayout(0, block_layout(), WORDS)
    return reinterpret(ring.pages.index(slot), gl.int32, [TILES, ROWS, COUNT], fragments(TILES, COUNT)).load(A)


@gluon.constexpr_function
def words_of(shape):
    """How many words have a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


@gluon.constexpr_function
def many(count, shape):
    """The shape of so many of a shape."""
    return [count] + list(shape)


@gluon.constexpr_function
def box_of(words):
    """As `megakernel.geometry.beside_box`."""
    line = min(words, BOX.value)
    return [words // line, line]


@gluon.jit
def beside_of(S: gl.constexpr, ring, slot, TYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory for the words beside the page in a slot, behind the staged vector, as SHAPE."""
    BYTES: gl.constexpr = 4 * words_of(SHAPE)
    EACH: gl.constexpr = S.beside_bytes // BYTES
    FIRST: gl.constexpr = S.staging_pages * UNIT // BYTES
    TOTAL: gl.constexpr = (S.staging_pages + S.beside_pages) * UNIT // BYTES
    return reinterpret(ring.staging, TYPE, many(TOTAL, SHAPE), LAYOUT).index(FIRST + slot * EACH)


@gluon.jit
def copy_words(S: gl.constexpr, beside, ring, number, slot, COUNT: gl.constexpr):
    """Ask for the COUNT words beside page `number` of a descriptor's pages, to land with the page in a slot."""
    LAYOUT: gl.constexpr = beside.layout
    LINES: gl.constexpr = box_of(COUNT)
    copy_page(beside, [number * LINES[0], 0], ring.full.index(slot), beside_of(S, ring, slot, gl.float32, LINES, LAYOUT))


@gluon.jit
def sums_of(S: gl.constexpr, ring, COUNT: gl.constexpr):
    """Where the sums of groups of the staged vector lie, behind it: fp32 [rows, COUNT], and which row is the first."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS_: gl.constexpr = S.staging_pages * (UNIT // 4) // COUNT
    FIRST: gl.constexpr = (S.staging_pages - S.sums_pages) * (UNIT // 4) // COUNT
    return reinterpret(ring.staging, gl.float32, [ROWS_, COUNT], LAYOUT), FIRST


@gluon.jit
def stage_sums_of(S: gl.constexpr, ring, part, values, GROUP: gl.constexpr):
    """The sums of the groups of so many columns of part `part` of the vector, bf16 [columns]."""
    COUNT: gl.constexpr = values.shape[0] // GROUP
    sums, first = sums_of(S, ring, COUNT)
    groups = gl.reshape(values.to(gl.float32), [COUNT, GROUP])
    sums.index(first + part).store(gl.sum(groups, axis=1))
