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
from megakernel.device.prefill.order import let_next_start, wait_for_previous
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
PIECE = gl.constexpr(64)  # columns of a tile that are finished together, so that they fit the registers
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
def column_halves(acc):
    """The left and the right half of a tile's columns."""
    tokens: gl.constexpr = acc.shape[0]
    width: gl.constexpr = acc.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(acc, [tokens, 2, width]), [0, 2, 1]))


@gluon.jit
def token_rows(T: gl.constexpr, item, WHO: gl.constexpr, LAYOUT: gl.constexpr):
    """The chunk's tokens that consumer `WHO` has of an item."""
    return item.row * T.tokens + WHO * ROWS + gl.arange(0, ROWS, LAYOUT)


@gluon.jit
def tile_blocks(T: gl.constexpr, item, first: gl.constexpr, count: gl.constexpr, LAYOUT: gl.constexpr):
    """Row blocks of the matrix: `count` from a tile's column `first` on."""
    return item.column * (T.tile // BLOCK) + first // BLOCK + gl.arange(0, count, LAYOUT)


@gluon.jit
def norm_scale(S: gl.constexpr, T: gl.constexpr, squares, chunk, item, WHO: gl.constexpr):
    """1 / sqrt(mean square + epsilon) of an item's tokens."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, T.squares], [32, 1], [4, 1], [1, 0])
    rows = token_rows(T, item, WHO, gl.SliceLayout(1, LAYOUT))
    places = gl.arange(0, T.squares, gl.SliceLayout(0, LAYOUT))
    known = (rows < chunk.count)[:, None]
    sums = gl.load(squares + rows[:, None] * T.squares + places[None, :], mask=known, other=1.0)
    return gl.rsqrt(gl.sum(sums, axis=1) / S.hidden + S.epsilon)


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
def angles(S: gl.constexpr, T: gl.constexpr, model, chunk, item, low, first: gl.constexpr, WHO: gl.constexpr):
    """Cosines and sines of the pairs that begin with `low` [64, blocks, 8], which lie side by side in memory; 1 and 0 for
    values."""
    BLOCKS: gl.constexpr = low.shape[1]
    LAYOUT: gl.constexpr = angles_layout(BLOCKS)
    rows = token_rows(T, item, WHO, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    block = tile_blocks(T, item, first, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    both = gl.arange(0, 2 * HALF, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    pair = (chunk.start + rows) * (S.head_rows // 2) + block % S.head_blocks * HALF
    turned = (rows < chunk.count) & (block < T.blocks) & (block // S.head_blocks % (S.group + 2) <= S.group)
    found = gl.load(model.rope + pair * 2 + both, mask=turned, other=0.0)
    found = gl.where(turned | (both % 2 != 0), found, 1.0)
    cosine, sine = gl.split(gl.reshape(found, [ROWS, BLOCKS, HALF, 2]))
    return gl.convert_layout(cosine, low.type.layout), gl.convert_layout(sine, low.type.layout)


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
    squares = gl.reshape(gl.sum(low * low + high * high, axis=2), [ROWS, HEADS, S.head_blocks])
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
def keep_qkv(
    S: gl.constexpr, T: gl.constexpr, model, at, work, chunk, item, scale, acc, first: gl.constexpr, WHO: gl.constexpr
):
    """Queries to their buffer, keys and values to the cache; `acc` are the tile's columns from `first` on."""
    if acc.shape[1] > piece_of_heads(S):
        left, right = column_halves(acc)
        keep_qkv(S, T, model, at, work, chunk, item, scale, left, first, WHO)
        keep_qkv(S, T, model, at, work, chunk, item, scale, right, first + acc.shape[1] // 2, WHO)
    else:
        low, high = pairs(scaled(acc, scale))
        TOKENS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, low.type.layout))
        BLOCKS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, low.type.layout))
        WITHIN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, low.type.layout))
        rows = token_rows(T, item, WHO, TOKENS)[:, None, None]
        block = tile_blocks(T, item, first, acc.shape[1] // BLOCK, BLOCKS)[None, :, None]
        within = gl.arange(0, HALF, WITHIN)[None, None, :]
        known = (rows < chunk.count) & (block < T.blocks)
        slot, inner = block // S.head_blocks, block % S.head_blocks
        head, part = slot // (S.group + 2), slot % (S.group + 2)
        if S.qkv.bias.first >= 0:
            bias = layer_constants(model, S.qkv.bias, work.layer) + block * BLOCK + within
            low += gl.load(bias, mask=block < T.blocks, other=0.0)
            high += gl.load(bias + HALF, mask=block < T.blocks, other=0.0)
        position = chunk.start + rows
        if S.head_norm.first >= 0:
            low, high = norm_heads(S, T, model, work.layer, item, low, high, first)
        cosine, sine = angles(S, T, model, chunk, item, low, first, WHO)
        low, high = rotate(low, high, cosine, sine)
        place = inner * BLOCK + within
        query = at.queries + (rows * T.heads + head * S.group + part) * T.head + place
        cached = cache_address(S, model.cache, model.head_pages, work.layer, head, part - S.group, position, place)
        is_query = part < S.group
        gl.store(query, finite(low).to(gl.bfloat16), mask=known & is_query)
        gl.store(query + HALF, finite(high).to(gl.bfloat16), mask=known & is_query)
        gl.store(cached, finite(low).to(gl.bfloat16), mask=known & (part >= S.group))
        gl.store(cached + HALF, finite(high).to(gl.bfloat16), mask=known & (part >= S.group))


@gluon.jit
def keep_units(
    S: gl.constexpr, T: gl.constexpr, model, at, work, chunk, item, scale, acc, first: gl.constexpr, WHO: gl.constexpr
):
    """SwiGLU of gates and ups; `acc` are the tile's columns from `first` on."""
    if acc.shape[1] > PIECE:
        left, right = column_halves(acc)
        keep_units(S, T, model, at, work, chunk, item, scale, left, first, WHO)
        keep_units(S, T, model, at, work, chunk, item, scale, right, first + acc.shape[1] // 2, WHO)
    else:
        gate, up = pairs(scaled(acc, scale))
        TOKENS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gate.type.layout))
        BLOCKS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gate.type.layout))
        WITHIN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gate.type.layout))
        rows = token_rows(T, item, WHO, TOKENS)[:, None, None]
        block = tile_blocks(T, item, first, acc.shape[1] // BLOCK, BLOCKS)[None, :, None]
        within = gl.arange(0, HALF, WITHIN)[None, None, :]
        if S.gate_up.bias.first >= 0:
            bias = layer_constants(model, S.gate_up.bias, work.layer) + block * BLOCK + within
            gate += gl.load(bias, mask=block < T.blocks, other=0.0)
            up += gl.load(bias + HALF, mask=block < T.blocks, other=0.0)
        unit = block * HALF + within
        known = (rows < chunk.count) & (unit < S.down.columns)
        gl.store(at.units + rows * T.units + unit, swiglu(gate, up).to(gl.bfloat16), mask=known)


@gluon.jit
def keep_residual(
    S: gl.constexpr, T: gl.constexpr, constants, bias, norm, at, chunk, item, acc, first: gl.constexpr, WHO: gl.constexpr
):
    """The residual plus a product and its bias (an offset in the constants, -1: none), and the next product's input.

    `acc` are the tile's columns from `first` on.
    """
    if acc.shape[1] > PIECE:
        left, right = column_halves(acc)
        keep_residual(S, T, constants, bias, norm, at, chunk, item, left, first, WHO)
        keep_residual(S, T, constants, bias, norm, at, chunk, item, right, first + acc.shape[1] // 2, WHO)
    else:
        rows = token_rows(T, item, WHO, gl.SliceLayout(1, acc.type.layout))
        columns = item.column * T.tile + first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        known = (rows < chunk.count)[:, None] & (columns < S.hidden)[None, :]
        place = at.residual + rows[:, None] * S.hidden + columns[None, :]
        before = gl.load(place, mask=known, other=0.0)
        if S.residual_multiplier != 1.0:
            if bias >= 0:
                acc += gl.load(constants + bias + columns, mask=columns < S.hidden, other=0.0)[None, :]
            x = before + acc * S.residual_multiplier
        else:
            x = before + acc
            if bias >= 0:
                x += gl.load(constants + bias + columns, mask=columns < S.hidden, other=0.0)[None, :]
        gl.store(place, x, mask=known)
        weights = gl.load(constants + norm + columns, mask=columns < S.hidden, other=0.0)
        normed = at.normed + rows[:, None] * T.normed + columns[None, :]
        gl.store(normed, (x * weights[None, :]).to(gl.bfloat16), mask=known)
        sums = gl.sum(gl.where(known, x * x, 0.0), axis=1)
        place = (item.column * T.tile + first) // PIECE
        gl.store(at.squares + rows * T.squares + place, sums, mask=(rows < chunk.count) & (place < T.squares))


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
def keep(S: gl.constexpr, T: gl.constexpr, model, at, work, chunk, item, acc, bias, norm, WHO: gl.constexpr):
    """Finish a tile as its matrix asks."""
    if T.kind == "residual":
        keep_residual(S, T, model.constants, bias, norm, at, chunk, item, acc, 0, WHO)
    else:
        scale = norm_scale(S, T, at.squares, chunk, item, WHO)
        if T.kind == "qkv":
            keep_qkv(S, T, model, at, work, chunk, item, scale, acc, 0, WHO)
        else:
            keep_units(S, T, model, at, work, chunk, item, scale, acc, 0, WHO)


@gluon.jit
def consume(S: gl.constexpr, T: gl.constexpr, model, at, work, chunk, operands, bias, norm, WHO: gl.constexpr):
    """Consumer `WHO`: its tokens of all of this SM's items."""
    use = 0
    for index in range(gl.program_id(0), item_count(T, work, chunk), gl.num_programs(0)):
        item = item_at(T, work, chunk, index)
        acc, whole, use = tile_product(T, work, chunk, operands, use, item, WHO)
        if whole:
            keep(S, T, model, at, work, chunk, item, acc, bias, norm, WHO)


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

    `place` is the layer's in w; where that is a buffer to which weights are widened, what comes next may begin to overwrite
    another such buffer, and starts when the kernel before this one has ended.

    `bias` and `norm` are for what is added to the residual: where its bias and the weights of the next norm start in the
    constants.
    """
    if not T.widened:
        let_next_start()
    chunk = read_chunk(chunk)
    work = Work(layer, place, tiles, columns, steps, split, parts, arrivals)
    at = Activations(residual, normed, squares, queries, units)
    model = Model(constants, rope, cache, head_pages)
    operands = make_operands(T, x, w)
    wait_for_previous()
    if T.widened:
        let_next_start()
    if T.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (S, T, model, at, work, chunk, operands, bias, norm, 0)),
                (consume, (S, T, model, at, work, chunk, operands, bias, norm, 1)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (S, T, model, at, work, chunk, operands, bias, norm, 0)),
                (load_operands, (T, x, w, work, chunk, operands)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
