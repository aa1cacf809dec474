"""What becomes of a product, matrix by matrix: the epilogues of prefill's four projections.

The residual stream x stays fp32.  What a norm would do is done around the products: whoever finishes x writes it times the
norm's weights, rounded to bf16, as the next product's input, and leaves the sum of its squares over each tile of columns; the
product's result is then multiplied with 1 / sqrt(mean square + epsilon) of its token.  So no pass over x comes between.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.cache import cache_address, finite
from megakernel.device.compat import aggregate
from megakernel.device.gate_up import swiglu
from megakernel.device.matvec import layer_constants
from megakernel.device.opaque import nothing
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.pieces import (
    PIECE,
    UNITS_PIECE,
    by_lines,
    later_rows,
    line_columns,
    line_rows,
    make_rooms,
    narrow_by_lines,
    narrow_lines,
    piece_of,
    summed_rows,
)
from megakernel.device.prefill.product import (
    BLOCK,
    ROWS,
    Work,
    add_parts,
    item_at,
    item_count,
    load_operands,
    make_operands,
    multiply,
    read_chunk,
)
from megakernel.device.qkv import rotate

HALF = gl.constexpr(BLOCK.value // 2)
LOADER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)


@aggregate
class Activations:
    """What a chunk of tokens leaves between the kernels; row i belongs to the chunk's token i.

    residual: fp32 [chunk, hidden].  normed: bf16 [chunk, hidden stride], the residual times a norm's weights.  squares: fp32
    [chunk, square places], sums of the residual's squares over 64 columns each.  queries: bf16 [chunk, heads, padded head],
    rotated, rows in the order of the tape.  units: bf16 [chunk, intermediate stride].
    """

    residual: gl.tensor
    normed: gl.tensor
    squares: gl.tensor
    queries: gl.tensor
    units: gl.tensor


@aggregate
class Model:
    """What the kernels take of a model beside its matrices; see `megakernel.device.context.Memory`."""

    constants: gl.tensor
    rope: gl.tensor
    cache: gl.tensor
    head_pages: gl.tensor


@gluon.jit
def pairs(acc):
    """Rows 0 to 7 and rows 8 to 15 of each block of a tile [64, tile], element for element beside each other."""
    tokens: gl.constexpr = acc.shape[0]
    blocks: gl.constexpr = acc.shape[1] // BLOCK
    return gl.split(gl.permute(gl.reshape(acc, [tokens, blocks, 2, HALF]), [0, 1, 3, 2]))


@gluon.jit
def paired(low, high):
    """The columns of a tile again, of what `pairs` has made of them."""
    tokens: gl.constexpr = low.shape[0]
    columns: gl.constexpr = low.shape[1] * BLOCK
    return gl.reshape(gl.permute(gl.join(low, high), [0, 1, 3, 2]), [tokens, columns])


@gluon.jit
def token_rows(T: gl.constexpr, item, WHO: gl.constexpr, LAYOUT: gl.constexpr):
    """The chunk's tokens that consumer `WHO` has of an item."""
    return item.row * T.tokens + WHO * ROWS + gl.arange(0, ROWS, LAYOUT)


@gluon.jit
def tile_blocks(T: gl.constexpr, item, first: gl.constexpr, count: gl.constexpr, LAYOUT: gl.constexpr):
    """Row blocks of the matrix: `count` from a tile's column `first` on."""
    return item.column * (T.tile // BLOCK) + first // BLOCK + gl.arange(0, count, LAYOUT)


@gluon.constexpr_function
def squares_layout(places):
    """[64, places]: as many threads as can share a row."""
    together = min(4, places)
    lanes = min(32, places // together)
    return gl.BlockedLayout([1, together], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def token_squares(T: gl.constexpr, squares, chunk, item, WHO: gl.constexpr):
    """The sums of squares of an item's tokens, [64, places]."""
    LAYOUT: gl.constexpr = squares_layout(T.squares)
    rows = token_rows(T, item, WHO, gl.SliceLayout(1, LAYOUT))
    places = gl.arange(0, T.squares, gl.SliceLayout(0, LAYOUT))
    known = (rows < chunk.count)[:, None] & (places >= 0)[None, :]
    return gl.load(squares + rows[:, None] * T.squares + places[None, :], mask=known, other=1.0)


@gluon.jit
def norm_scale(S: gl.constexpr, squares):
    """1 / sqrt(mean square + epsilon) of tokens, of their sums of squares."""
    return gl.rsqrt(gl.sum(squares, axis=1) / S.hidden + S.epsilon)


@gluon.jit
def scaled(acc, scale):
    """A product [64, columns] of tokens that were not divided by their root mean square, divided by it."""
    return acc * gl.convert_layout(scale, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.constexpr_function
def angles_layout(blocks):
    """[64, blocks, 16]: to each thread the angles, two numbers each, of the pairs that it has of an accumulator."""
    of_blocks = [[0, 1 << bit, 0] for bit in range(blocks.bit_length() - 1)]
    registers = [[0, 0, 1], [0, 0, 2], [8, 0, 0], *of_blocks]
    lanes = [[0, 0, 4], [0, 0, 8], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, blocks, 16])


@gluon.jit
def load_angles(S: gl.constexpr, T: gl.constexpr, model, chunk, item, first: gl.constexpr, WHO: gl.constexpr):
    """Cosines and sines, beside each other, of a piece, a tile's columns from `first` on; 1 and 0 for values."""
    BLOCKS: gl.constexpr = PIECE // BLOCK
    LAYOUT: gl.constexpr = angles_layout(BLOCKS)
    rows = token_rows(T, item, WHO, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    block = tile_blocks(T, item, first, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    both = gl.arange(0, 2 * HALF, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    rows += nothing()  # or places of all pieces would be kept in registers
    pair = (chunk.start + rows) * (S.head_rows // 2) + block % S.head_blocks * HALF
    turned = (rows < chunk.count) & (block < T.blocks) & (block // S.head_blocks % (S.group + 2) <= S.group)
    found = gl.load(model.rope + pair * 2 + both, mask=turned, other=0.0)
    return gl.where(turned | (both % 2 != 0), found, 1.0)


@gluon.jit
def turned(both, angles):
    """Pairs rotated by what `load_angles` has found for them."""
    low, high = both
    LAYOUT: gl.constexpr = low.type.layout
    cosine, sine = gl.split(gl.reshape(angles, [low.shape[0], low.shape[1], HALF, 2]))
    return rotate(low, high, gl.convert_layout(cosine, LAYOUT), gl.convert_layout(sine, LAYOUT))


@gluon.constexpr_function
def min_of(one, other):
    """The smaller of two compile-time numbers."""
    return min(one, other)


@gluon.constexpr_function
def piece_of_heads(sizes):
    """Columns of a QKV tile that are finished together: whole heads, where these are normed."""
    return PIECE.value if sizes.head_norm.value.first.value < 0 else max(PIECE.value, sizes.head_rows.value)


@gluon.jit
def norm_heads(S: gl.constexpr, T: gl.constexpr, model, layer, item, low, high, first: gl.constexpr):
    """Queries and keys divided by the root mean square of their head, and times its weights; values as they are."""
    LAYOUT: gl.constexpr = low.type.layout
    BLOCKS: gl.constexpr = low.shape[1]
    HEADS: gl.constexpr = BLOCKS // S.head_blocks
    squares = gl.reshape(gl.sum(gl.fma(low, low, high * high), axis=2), [ROWS, HEADS, S.head_blocks])
    factor = gl.rsqrt(gl.sum(squares, axis=2) / S.head_dim + S.epsilon)
    factor, _ = gl.broadcast(factor[:, :, None], squares)
    factor = gl.convert_layout(gl.reshape(factor, [ROWS, BLOCKS]), gl.SliceLayout(2, LAYOUT))[:, :, None]
    block = tile_blocks(T, item, first, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    within = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    part = block // S.head_blocks % (S.group + 2)
    normed = part <= S.group
    weight = layer_constants(model, S.head_norm, layer) + (part // S.group) * S.head_rows
    weight += block % S.head_blocks * BLOCK + within
    low = gl.where(normed, low * factor * gl.load(weight, mask=normed, other=0.0), low)
    high = gl.where(normed, high * factor * gl.load(weight + HALF, mask=normed, other=0.0), high)
    return low, high


@gluon.jit
def store_heads(
    S: gl.constexpr, T: gl.constexpr, model, at, layer, chunk, item, values, first: gl.constexpr, WHO: gl.constexpr
):
    """Queries to their buffer, keys and values to the cache: bf16 [64, 64], the tile's columns from `first` on."""
    HALVES: gl.constexpr = PIECE // HALF  # of row blocks, 16 bytes each
    halves = gl.reshape(values, [ROWS, HALVES, HALF])
    LAYOUT: gl.constexpr = halves.type.layout
    rows = token_rows(T, item, WHO, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    rows += nothing()  # or places of all pieces would be kept in registers
    half = item.column * (T.tile // HALF) + first // HALF
    half = (half + gl.arange(0, HALVES, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))))[None, :, None]
    within = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    block = half // 2
    slot, place = block // S.head_blocks, block % S.head_blocks * BLOCK + half % 2 * HALF
    head, part = slot // (S.group + 2), slot % (S.group + 2)
    known = (rows < chunk.count) & (block < T.blocks)
    query = at.queries + (rows * T.heads + head * S.group + part) * T.head + place
    position = chunk.start + rows
    cached = cache_address(S, model.cache, model.head_pages, layer, head, part - S.group, position, place + within)
    gl.store(query + within, halves, mask=known & (part < S.group) & (within >= 0))
    gl.store(cached, halves, mask=known & (part >= S.group) & (within >= 0))


@gluon.jit
def keep_qkv(S: gl.constexpr, T: gl.constexpr, model, at, work, room, chunk, item, scale, acc, WHO: gl.constexpr):
    """Heads as attention reads them, each piece's angles on their way while the one before is stored, unless heads are normed:
    registers would not do."""
    WIDTH: gl.constexpr = min_of(piece_of_heads(S), T.tile)
    AHEAD: gl.constexpr = S.head_norm.first < 0
    angles = load_angles(S, T, model, chunk, item, 0, WHO) if AHEAD else 0
    for i in gl.static_range(T.tile // PIECE):
        if i * PIECE % WIDTH == 0:
            heads = scaled(piece_of(acc, i * PIECE, WIDTH), scale)
            if (S.qkv.bias.first >= 0) | (S.head_norm.first >= 0):
                heads = finished_heads(S, T, model, work.layer, item, heads, i * PIECE)
        if not AHEAD:
            angles = load_angles(S, T, model, chunk, item, i * PIECE, WHO)
        low, high = turned(pairs(piece_of(heads, i * PIECE % WIDTH, PIECE)), angles)
        if AHEAD and (i + 1) * PIECE < T.tile:
            angles = load_angles(S, T, model, chunk, item, (i + 1) * PIECE, WHO)
        values = narrow_by_lines(room, paired(finite(low).to(gl.bfloat16), finite(high).to(gl.bfloat16)))
        store_heads(S, T, model, at, work.layer, chunk, item, values, i * PIECE, WHO)


@gluon.jit
def finished_heads(S: gl.constexpr, T: gl.constexpr, model, layer, item, heads, first: gl.constexpr):
    """Whole heads with their biases and norms, not yet turned: a tile's columns from `first` on."""
    low, high = pairs(heads)
    if S.qkv.bias.first >= 0:
        low, high = biased(S, T, model, S.qkv, layer, item, low, high, first)
    if S.head_norm.first >= 0:
        low, high = norm_heads(S, T, model, layer, item, low, high, first)
    return paired(low, high)


@gluon.jit
def biased(S: gl.constexpr, T: gl.constexpr, model, matrix: gl.constexpr, layer, item, low, high, first: gl.constexpr):
    """Rows 0 to 7 and 8 to 15 of the blocks of a tile, from column `first` on, and their biases."""
    LAYOUT: gl.constexpr = low.type.layout
    block = tile_blocks(T, item, first, low.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    within = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    bias = layer_constants(model, matrix.bias, layer) + block * BLOCK + within
    known = (block < T.blocks) & (within >= 0)
    return low + gl.load(bias, mask=known, other=0.0), high + gl.load(bias + HALF, mask=known, other=0.0)


@gluon.jit
def keep_units(S: gl.constexpr, T: gl.constexpr, model, at, work, room, chunk, item, scale, acc, WHO: gl.constexpr):
    """SwiGLU of gates and ups."""
    WIDTH: gl.constexpr = min_of(UNITS_PIECE, T.tile)
    UNITS: gl.constexpr = WIDTH // 2
    LAYOUT: gl.constexpr = narrow_lines(UNITS)
    for i in gl.static_range(T.tile // WIDTH):
        gate, up = pairs(scaled(piece_of(acc, i * WIDTH, WIDTH), scale))
        if S.gate_up.bias.first >= 0:
            gate, up = biased(S, T, model, S.gate_up, work.layer, item, gate, up, i * WIDTH)
        values = narrow_by_lines(room, gl.reshape(swiglu(gate, up).to(gl.bfloat16), [ROWS, UNITS]))
        rows = token_rows(T, item, WHO, gl.SliceLayout(1, LAYOUT))[:, None]
        unit = item.column * (T.tile // 2) + i * UNITS + gl.arange(0, UNITS, gl.SliceLayout(0, LAYOUT))[None, :]
        known = (rows < chunk.count) & (unit < S.down.columns)
        gl.store(at.units + rows * T.units + unit, values, mask=known)


@aggregate
class Spot:
    """Where a piece lies in the residual stream, [1, 8, 64]: its first row and columns; and which of its rows there are."""

    row: gl.tensor
    column: gl.tensor
    there: gl.tensor


@gluon.jit
def spot_of(S: gl.constexpr, T: gl.constexpr, chunk, item, first: gl.constexpr, WHO: gl.constexpr):
    """Of a tile's columns from `first` on."""
    number = item.column * (T.tile // PIECE) + first // PIECE + nothing()  # or all places would be kept in registers
    before = item.row * T.tokens + WHO * ROWS
    column = number * PIECE + line_columns()
    row = before + line_rows()
    return Spot(row, column, (row + later_rows() < chunk.count) & (column < S.hidden))


@gluon.jit
def load_residual(S: gl.constexpr, T: gl.constexpr, at, chunk, item, first: gl.constexpr, WHO: gl.constexpr):
    """The residual stream as it was, where a piece is added to it."""
    spot = spot_of(S, T, chunk, item, first, WHO)
    place = at.residual + (spot.row * S.hidden + spot.column)
    return gl.load(place + later_rows() * S.hidden, mask=spot.there, other=0.0)


@gluon.jit
def keep_residual(
    S: gl.constexpr, T: gl.constexpr, constants, bias, norm, at, room, chunk, item, ahead, acc, WHO: gl.constexpr
):
    """The residual plus a product and its bias (an offset in the constants, -1: none), and the next product's input.

    `ahead`: the residual of the tile's first piece.  That of each other is on its way while the one before is stored.
    """
    for i in gl.static_range(T.tile // PIECE):
        before = ahead
        if (i + 1) * PIECE < T.tile:
            ahead = load_residual(S, T, at, chunk, item, (i + 1) * PIECE, WHO)
        spot = spot_of(S, T, chunk, item, i * PIECE, WHO)
        known = spot.column < S.hidden
        weights = gl.load(constants + norm + spot.column, mask=known, other=0.0)
        product = by_lines(room, piece_of(acc, i * PIECE, PIECE))
        if S.residual_multiplier != 1.0:
            if bias >= 0:
                product += gl.load(constants + bias + spot.column, mask=known, other=0.0)
            x = before + product * S.residual_multiplier
        else:
            x = before + product
            if bias >= 0:
                x += gl.load(constants + bias + spot.column, mask=known, other=0.0)
        place = at.residual + (spot.row * S.hidden + spot.column)
        gl.store(place + later_rows() * S.hidden, x, mask=spot.there)
        place = at.normed + (spot.row * T.normed + spot.column)
        gl.store(place + later_rows() * T.normed, (x * weights).to(gl.bfloat16), mask=spot.there)
        sums = gl.sum(gl.where(spot.there, x * x, 0.0), axis=2)
        row = item.row * T.tokens + WHO * ROWS + summed_rows()
        number = item.column * (T.tile // PIECE) + i
        gl.store(at.squares + row * T.squares + number, sums, mask=(row < chunk.count) & (number < T.squares))


@gluon.jit
def tile_product(T: gl.constexpr, work, chunk, operands, use, item, WHO: gl.constexpr):
    """The product of an item, whether it is whole, and the ring's use after it."""
    steps = item.last - item.first
    acc = multiply(T, operands, use, steps, WHO)
    whole = True
    if work.split > 1:
        acc, whole = add_parts(T, work, chunk, item, acc, WHO)
    return acc, whole, use + steps


@gluon.jit
def load_ahead(S: gl.constexpr, T: gl.constexpr, at, chunk, item, WHO: gl.constexpr):
    """What finishing a tile begins with: it is on its way while the tile is multiplied."""
    if T.kind == "residual":
        return load_residual(S, T, at, chunk, item, 0, WHO)
    else:
        return token_squares(T, at.squares, chunk, item, WHO)


@gluon.jit
def keep(S: gl.constexpr, T: gl.constexpr, model, at, work, room, chunk, item, ahead, acc, bias, norm, WHO: gl.constexpr):
    """Finish a tile as its matrix asks."""
    if T.kind == "residual":
        keep_residual(S, T, model.constants, bias, norm, at, room, chunk, item, ahead, acc, WHO)
    else:
        scale = norm_scale(S, ahead)
        if T.kind == "qkv":
            keep_qkv(S, T, model, at, work, room, chunk, item, scale, acc, WHO)
        else:
            keep_units(S, T, model, at, work, room, chunk, item, scale, acc, WHO)


@gluon.jit
def consume(S: gl.constexpr, T: gl.constexpr, model, at, work, chunk, operands, rooms, bias, norm, WHO: gl.constexpr):
    """Consumer `WHO`: its tokens of all of this SM's items."""
    use = 0
    for index in range(gl.program_id(0), item_count(T, work, chunk), gl.num_programs(0)):
        item = item_at(T, work, chunk, index)
        ahead = load_ahead(S, T, at, chunk, item, WHO)
        acc, whole, use = tile_product(T, work, chunk, operands, use, item, WHO)
        if work.split > 1:
            ahead = load_ahead(S, T, at, chunk, item, WHO)  # again: while parts are added it would be kept in local memory
        if whole:
            keep(S, T, model, at, work, rooms.index(WHO), chunk, item, ahead, acc, bias, norm, WHO)


# Numbers on which nothing is specialised.
ARGUMENTS = ["layer", "place", "columns", "steps", "split", "head_pages", "bias", "norm"]


@gluon.jit(do_not_specialize=ARGUMENTS)
def read_product(
    x,
    w,
    chunk,
    tiles,
    parts,
    arrivals,
    residual,
    normed,
    squares,
    queries,
    units,
    constants,
    rope,
    cache,
    layer,
    place,
    columns,
    steps,
    split,
    head_pages,
    bias,
    norm,
    S: gl.constexpr,
    T: gl.constexpr,
):
    """One matrix of a layer, for all tokens of a chunk: x and w are TMA descriptors of its input and of its kind on the tape.

    `place` is the layer's in w.

    `bias` and `norm` are for what is added to the residual: where its bias and the weights of the next norm start in the
    constants.
    """
    let_next_start()
    chunk = read_chunk(chunk)
    work = Work(layer, place, tiles, columns, steps, split, parts, arrivals)
    at = Activations(residual, normed, squares, queries, units)
    model = Model(constants, rope, cache, head_pages)
    operands, rooms = make_operands(T, x, w), make_rooms(T.consumers)
    wait_for_previous()
    if T.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (S, T, model, at, work, chunk, operands, rooms, bias, norm, 0)),
                (consume, (S, T, model, at, work, chunk, operands, rooms, bias, norm, 1)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (S, T, model, at, work, chunk, operands, rooms, bias, norm, 0)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
