"""Which tiles a grouped product has, found on the device from the offsets; `megakernel.grouped.tiling.tiles` is its mirror.

Tiles are numbered group after group.  Within a group, `band` tiles of tokens at a time go through all tiles of the matrix's
rows, in parts of about as many tiles as there are SMs: what these load, they find in L2 many times over.  An SM's tiles are
every so manieth, so whoever walks from one to the next only ever goes forward.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.compat import aggregate
from megakernel.grouped.tiling import CUTS as HOST_CUTS
from megakernel.grouped.tiling import TILE_ROWS as HOST_TILE_ROWS

TILE_ROWS = gl.constexpr(HOST_TILE_ROWS)
CUTS = gl.constexpr(HOST_CUTS)


@aggregate
class Work:
    """The whole product: rows of x, rows of a matrix and their tiles, steps along K, and how groups are cut."""

    offsets: gl.tensor  # int32 [groups]: where each group ends
    groups: gl.tensor
    rows: gl.tensor
    n: gl.tensor
    columns: gl.tensor
    steps: gl.tensor
    main: gl.tensor  # tokens of a tile, two to the power of
    shift: gl.tensor  # this,
    tail: gl.tensor  # and how many more the last of a group may have
    items: gl.tensor  # tiles,
    band: gl.tensor  # of which so many tiles of tokens go through the matrix together


@aggregate
class Place:
    """A group, the number of its first tile, its rows, and where the next group ends."""

    group: gl.tensor
    item: gl.tensor
    start: gl.tensor
    stop: gl.tensor
    after: gl.tensor


@aggregate
class Item:
    """One tile: its group, its first row of x and how many, its tile of the matrix's rows."""

    group: gl.tensor
    start: gl.tensor
    count: gl.tensor
    column: gl.tensor


@gluon.jit
def group_end(offsets, group, groups, rows):
    """Where a group ends, within x; beyond the last group and before the first there is none."""
    found = gl.load(offsets + group, mask=(group >= 0) & (group < groups), other=0)
    return gl.minimum(gl.maximum(found, 0), rows)


@gluon.jit
def token_tiles(count, shift, tail):
    """Tiles of a group of `count` rows."""
    return gl.where(count > 0, gl.maximum((count - tail + (1 << shift) - 1) >> shift, 1), 0)


@gluon.constexpr_function
def shift_of(cut):
    """The power of two that a cut's tiles have as tokens."""
    return CUTS.value[cut][0].bit_length() - 1


@gluon.jit
def total_tiles(counts, columns, CUT: gl.constexpr):
    """Tiles of all groups, cut so."""
    return gl.sum(token_tiles(counts, shift_of(CUT), CUTS[CUT][1]), axis=0) * columns


@gluon.jit
def plan_work(T: gl.constexpr, offsets, groups, rows, n, k, band):
    """The widest cut that gives every SM a tile, the narrowest if none does, and all that follows from it."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    group = gl.arange(0, T.groups, LAYOUT)
    counts = group_end(offsets, group, groups, rows) - group_end(offsets, group - 1, groups, rows)
    columns = gl.cdiv(n, TILE_ROWS)
    shift = gl.to_tensor(shift_of(2))
    tail = gl.to_tensor(CUTS[2][1])
    items = total_tiles(counts, columns, 2)
    for CUT in gl.static_range(1, -1, -1):
        wide = total_tiles(counts, columns, CUT)
        enough = wide >= gl.num_programs(0)
        shift = gl.where(enough, shift_of(CUT), shift)
        tail = gl.where(enough, CUTS[CUT][1], tail)
        items = gl.where(enough, wide, items)
    return Work(offsets, groups, rows, n, columns, gl.cdiv(k, T.step), 1 << shift, shift, tail, items, band)


@gluon.jit
def first_place(work):
    """The first group."""
    stop = group_end(work.offsets, 0, work.groups, work.rows)
    return Place(gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), stop, group_end(work.offsets, 1, work.groups, work.rows))


@gluon.jit
def seek(work, place, index):
    """The group that has tile number `index`, from an earlier one on."""
    group, item, start, stop, after = place.group, place.item, place.start, place.stop, place.after
    tiles = token_tiles(stop - start, work.shift, work.tail) * work.columns
    while index >= item + tiles:
        item += tiles
        group += 1
        start = stop
        stop = after
        after = group_end(work.offsets, group + 1, work.groups, work.rows)
        tiles = token_tiles(stop - start, work.shift, work.tail) * work.columns
    return Place(group, item, start, stop, after)


@gluon.jit
def item_at(work, place, index):
    """Tile number `index`, which is of the place's group."""
    count = place.stop - place.start
    tiles = token_tiles(count, work.shift, work.tail)
    within = index - place.item
    first = within // (work.band * work.columns) * work.band
    height = gl.minimum(tiles - first, work.band)
    within -= first * work.columns
    sms = gl.num_programs(0)
    span = gl.cdiv(work.columns, gl.maximum((work.columns * height + sms // 2) // sms, 1))
    left = within // (span * height) * span
    within -= left * height
    width = gl.minimum(work.columns - left, span)
    tile = first + within // width
    rest = count - tile * work.main
    return Item(
        place.group, place.start + tile * work.main, gl.where(tile == tiles - 1, rest, work.main), left + within % width
    )
