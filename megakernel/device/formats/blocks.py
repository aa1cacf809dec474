"""Device side of `models.formats.blocks`: groups of 32 columns, eight of which share a tile of accumulators, one a column.

The activation is the B operand with zeros in all columns but that of the group: so a tile of 128 columns sums its four groups
apart, in columns 0 to 3, and the fourth tile after it in columns 4 to 7.  The two are added, and every accumulator is then
scaled by what goes with its own row and group.  A lane loads of the activation what its own column takes, and no more.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.compat import reinterpret
from megakernel.device.formats.layouts import MMA_COLUMNS, ROWS, bits, block_layout, log2
from megakernel.device.formats.packed import ITEM, UNIT, beside_of, many, sums_of
from models.formats.blocks import GROUP as COLUMNS
from models.formats.blocks import TILE_GROUPS

GROUP = gl.constexpr(COLUMNS)
GROUPS = gl.constexpr(TILE_GROUPS)  # of a tile
TILE = gl.constexpr(COLUMNS * TILE_GROUPS)  # columns of a tile
WARPS = gl.constexpr(4)  # that tiles are spread over
STAGED = gl.constexpr(2)  # columns lie in their order
MINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0]))
HALVES = gl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
}""")


@gluon.constexpr_function
def operand_shape(tiles, lane):
    """The B operand of a page, cut along K into eights of tiles, halves of these, warps, chunks of a tile and columns of a
    chunk; and its 8 columns into halves, chunks and groups of a chunk."""
    chunk = WARPS.value * lane
    return [tiles // 8, 2, WARPS.value, TILE.value // chunk, chunk, 2, TILE.value // chunk, chunk // GROUP.value]


@gluon.constexpr_function
def staged_shape(tiles, lane):
    """A page of the staged vector, cut as its B operand is."""
    return operand_shape(tiles, lane)[:5]


@gluon.constexpr_function
def operand_layout(tiles, lane):
    """Of `operand_shape`: how a warp's lanes hold the B operand, `lane` columns side by side in each chunk."""
    shape = operand_shape(tiles, lane)
    own = log2(lane)
    registers = bits(shape, 4, range(own)) + bits(shape, 3, range(log2(shape[3]))) + bits(shape, 1, range(1))
    registers += bits(shape, 0, range(log2(shape[0])))
    lanes = bits(shape, 4, range(own, own + 2))
    lanes += bits(shape, 7, range(log2(shape[7]))) + bits(shape, 6, range(log2(shape[6]))) + bits(shape, 5, range(1))
    return gl.DistributedLinearLayout(registers, lanes, bits(shape, 2, range(2)), [], shape)


@gluon.constexpr_function
def sliced(layout, dimensions):
    """A layout without some of its dimensions, the last of them first."""
    for dimension in dimensions:
        layout = gl.SliceLayout(dimension, layout)
    return layout


@gluon.jit
def group_activation(ring, page, TILES: gl.constexpr, LANE: gl.constexpr):
    """Page `page` of the staged vector as the B operand, [tiles, columns of a tile, 8], each group in its own column alone."""
    SHAPE: gl.constexpr = operand_shape(TILES, LANE)
    FULL: gl.constexpr = operand_layout(TILES, LANE)
    B: gl.constexpr = gl.DotOperandLayout(1, block_layout(), LANE)
    PAGES: gl.constexpr = ring.staging.shape[0] * (UNIT // ITEM) // (TILES * TILE)
    tiles = reinterpret(ring.staging, gl.bfloat16, many(PAGES, staged_shape(TILES, LANE)), MINE).index(page)
    mine = tiles.permute([0, 2, 4, 1, 3]).load(sliced(FULL, [7, 3, 1]))
    x = gl.expand_dims(gl.expand_dims(gl.expand_dims(mine, 1), 3), 7)
    x, _ = gl.broadcast(x, gl.zeros(SHAPE, gl.bfloat16, FULL))
    x = alone(gl.reshape(x, [TILES, GROUPS, GROUP, MMA_COLUMNS]))
    return gl.convert_layout(gl.reshape(x, [TILES, TILE, MMA_COLUMNS]), B, assert_trivial=True)


@gluon.jit
def alone(x):
    """bf16 [tiles, groups, columns of a group, 8] with zeros but in the column of each group."""
    L: gl.constexpr = x.type.layout
    tile = gl.arange(0, x.shape[0], sliced(L, [3, 2, 1]))[:, None, None, None]
    group = gl.arange(0, GROUPS, sliced(L, [3, 2, 0]))[None, :, None, None]
    column = gl.arange(0, MMA_COLUMNS, sliced(L, [2, 1, 0]))[None, None, None, :]
    mask = gl.where(tile // WARPS % 2 * GROUPS + group == column, -1, 0).to(gl.int16)
    mask, _ = gl.broadcast(mask, x)
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.constexpr_function
def sums_layout(accumulators):
    """The sums of a page's groups, in their order, as [accumulators, columns]."""
    bases = [[0, 1], [0, 2], [1, 0], [2, 0], [0, 4]]
    bases += [[1 << bit, 0] for bit in range(2, log2(accumulators))]
    return gl.SharedLinearLayout(offset_bases=bases, block_bases=[], alignment=16)


@gluon.jit
def group_sums(S: gl.constexpr, ring, page, TILES: gl.constexpr):
    """The sums of the activations of page `page`, where the accumulators of their groups are: fp32 [tiles / 2, 1, 8]."""
    ACCUMULATORS: gl.constexpr = TILES // 2
    COUNT: gl.constexpr = TILES * GROUPS
    _, first = sums_of(S, ring, COUNT)
    ALL: gl.constexpr = S.staging_pages * (UNIT // 4) // COUNT
    sums = reinterpret(ring.staging, gl.float32, [ALL, ACCUMULATORS, MMA_COLUMNS], sums_layout(ACCUMULATORS))
    return gl.expand_dims(sums.index(first + page).load(gl.SliceLayout(1, block_layout())), 1)


@gluon.jit
def no_groups(TILES: gl.constexpr):
    """Accumulators, [tiles / 2, 16 rows, 8 columns]."""
    return gl.zeros([TILES // 2, ROWS, MMA_COLUMNS], gl.float32, block_layout())


@gluon.jit
def products_of_groups(a, x, TILES: gl.constexpr):
    """The products of a page's groups, where their accumulators are."""
    parts = mma_v2(a, x, gl.zeros([TILES, ROWS, MMA_COLUMNS], gl.float32, block_layout()))
    both = gl.sum(gl.reshape(parts, [TILES // 8, 2, WARPS, ROWS, MMA_COLUMNS]), axis=1)
    return gl.convert_layout(gl.reshape(both, [TILES // 2, ROWS, MMA_COLUMNS]), block_layout(), assert_trivial=True)


@gluon.jit
def total_of_groups(acc):
    """The sums over all groups of each warp, in all columns: fp32 [4, 16 rows, 8 columns]."""
    sums = gl.sum(gl.reshape(acc, [acc.shape[0] // WARPS, WARPS, ROWS, MMA_COLUMNS]), axis=0)
    sums = gl.convert_layout(sums, block_layout(), assert_trivial=True)
    total, _ = gl.broadcast(gl.expand_dims(gl.sum(sums, axis=2), 2), sums)
    return total


@gluon.constexpr_function
def words_layout(accumulators, each):
    """Words beside a page as `models.formats.blocks` has them, [accumulators, 16 rows, columns]: `each` of two groups of a row,
    then the other half block's, then the lanes'."""
    columns = MMA_COLUMNS.value // 2 * each
    shape = [accumulators, ROWS.value, columns]
    bases = bits(shape, 2, range(log2(each))) + bits(shape, 1, range(3, 4)) + bits(shape, 2, range(log2(each), log2(columns)))
    bases += bits(shape, 1, range(3)) + bits(shape, 0, range(log2(accumulators)))
    return gl.SharedLinearLayout(offset_bases=bases, block_bases=[], alignment=16)


@gluon.constexpr_function
def pairs_layout(accumulators):
    """[accumulators, 16 rows, 4] where a thread holds what goes with its own accumulators, two columns to one."""
    shape = [accumulators, ROWS.value, MMA_COLUMNS.value // 2]
    registers = bits(shape, 1, range(3, 4)) + bits(shape, 0, range(2, log2(accumulators)))
    return gl.DistributedLinearLayout(
        registers, bits(shape, 2, range(2)) + bits(shape, 1, range(3)), bits(shape, 0, range(2)), [], shape
    )


@gluon.jit
def halves_of(words):
    """The fp16 numbers in the low and the high half of words, in fp32."""
    return gl.inline_asm_elementwise(HALVES, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)


@gluon.jit
def pair_words(S: gl.constexpr, ring, slot, TILES: gl.constexpr):
    """The words beside the page in a slot, one for two groups: int32 [tiles / 2, 16 rows, 4]."""
    SHAPE: gl.constexpr = [TILES // 2, ROWS, MMA_COLUMNS // 2]
    beside = beside_of(S, ring, slot, gl.int32, SHAPE, words_layout(TILES // 2, 1))
    return beside.load(pairs_layout(TILES // 2))


@gluon.jit
def group_words(S: gl.constexpr, ring, slot, TILES: gl.constexpr):
    """The words beside the page in a slot, one for each group: int32 [tiles / 2, 16 rows, 8]."""
    SHAPE: gl.constexpr = [TILES // 2, ROWS, MMA_COLUMNS]
    return beside_of(S, ring, slot, gl.int32, SHAPE, words_layout(TILES // 2, 2)).load(block_layout())


@gluon.jit
def pair_scales(words):
    """The scales in `pair_words`, where the accumulators of their groups are."""
    low, high = halves_of(words)
    scales = gl.reshape(gl.join(low, high), [words.shape[0], ROWS, MMA_COLUMNS])
    return gl.convert_layout(scales, block_layout(), assert_trivial=True)


@gluon.jit
def place_of(row, group, EACH: gl.constexpr):
    """Where the first word of two groups lies beside a page, of which `group` is one: see `models.formats.blocks.places`."""
    tile = group // GROUPS
    accumulators, column = tile // 8 * WARPS + tile % WARPS, tile // WARPS % 2 * GROUPS + group % GROUPS
    return ((accumulators * 32 + row % 8 * 4 + column // 2) * 2 + row // 8) * EACH


@gluon.jit
def group_places(values, first, EACH: gl.constexpr):
    """For values [16 rows, groups, columns of a group] of a page, from its column `first` on: where the words of each row and
    group lie, and the group, int32 [16 rows, groups]."""
    OF_GROUPS: gl.constexpr = gl.SliceLayout(2, values.type.layout)
    group = first // GROUP + gl.arange(0, values.shape[1], gl.SliceLayout(0, OF_GROUPS))[None, :]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OF_GROUPS))[:, None]
    return place_of(row, group, EACH), group


@gluon.jit
def scales_at(beside, values, first):
    """The scales of values as `group_places` takes them, of words with those of two groups each: fp32 [16 rows, groups, 1]."""
    place, group = group_places(values, first, 1)
    low, high = halves_of(gl.load(beside + place).to(gl.int32, bitcast=True))
    return gl.where(group % 2 == 0, low, high)[:, :, None]
