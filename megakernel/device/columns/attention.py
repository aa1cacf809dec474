"""Attention of several columns of a sequence: the pages of its KV heads are read once for all of them.

The queries of a column fill as many columns of the matrix instruction as a group has heads, rounded up to a power of two.  The
positions of the step's own columns are not in the cache yet: their rows take the places in the page that they will have there,
so that a token's numbers do not depend on the column that computes it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mma_v2

from megakernel.device.cache import cache_address, finite
from megakernel.device.clocks import cycles
from megakernel.device.columns.operand import paired, place_of
from megakernel.device.columns.places import caches, first_position, progress, sequence_rows, slices_of
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.context import USED
from megakernel.device.formats.layouts import FLAT_TILES, MMA_COLUMNS
from megakernel.device.formats.plain import PAGE_LAYOUT, TILE
from megakernel.device.heads import (
    FLAT_HEADS,
    head_factor,
    output_dims,
    query_layout,
    rounded,
    score_layout,
    slice_pages,
    wait_page,
)
from megakernel.device.pages import release
from megakernel.device.sync import ALL, proxy_fence, wait_all
from megakernel.device.trace import COMPUTED, LANDED, STAGED, stamp
from megakernel.device.values import absent, in_first_warp, look, look_again, partials_of, put, put_apart, rows_of

CHUNK = gl.constexpr(8)  # numbers of 16 bytes, which TMA's swizzle moves as one
FLAT_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LINES = gl.constexpr(8)  # after which that swizzle repeats


@gluon.constexpr_function
def row_layout():
    """One line of a page, 64 numbers."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def column_of(S: gl.constexpr, query, first):
    """The column of a query of the group, where `first` is the first of those that the instruction takes, and its head within
    the group."""
    EACH: gl.constexpr = S.attention_columns // S.attention_width
    return first + query // EACH, query % EACH


@gluon.jit
def column_squares(S: gl.constexpr, memory, step, head, column, blocks, part, inside):
    """Sums of squares of the row blocks of a head: of query `part` of the group, or of its key."""
    place = rows_of(S, memory, step, S.squares, step.record.layer) + (head * (S.group + 1)) * S.head_blocks
    return look(place + column * S.squares.column + part * S.head_blocks + blocks, inside)


@gluon.jit
def swizzled(line, element):
    """Which number of a line of a page lies at its place `element`."""
    return ((element // CHUNK) ^ (line % LINES)) * CHUNK + element % CHUNK


@gluon.jit
def new_line(S: gl.constexpr, memory, step, head, column, value: gl.constexpr, line, tile: gl.constexpr):
    """The part of a column's key (value 0) or value (1) that is line `line` of a page, in the order in which it lies there."""
    dims = tile * TILE + swizzled(line, gl.arange(0, TILE, row_layout()))
    place = rows_of(S, memory, step, S.new_kv, step.record.layer) + (head * 2 + value) * S.head_rows
    if S.head_rows % TILE == 0:
        row = gl.load(place + column * S.new_kv.column + dims, volatile=True)
    else:
        row = look(place + column * S.new_kv.column + dims, dims < S.head_rows)
    if S.head_norm.first >= 0:
        if value == 0:
            blocks = gl.arange(0, S.head_tiles * TILE, gl.SliceLayout(0, query_layout()))
            squares = column_squares(S, memory, step, head, column, blocks, S.group, blocks < S.head_blocks)
            row *= head_factor(S, gl.sum(squares, axis=0))
    return finite(row).to(gl.bfloat16)


@gluon.jit
def new_lines(S: gl.constexpr, memory, step, head, last, value: gl.constexpr, position):
    """The keys (value 0) or values (1) of the step's own positions, up to the column `last`, as lines of pages: a tuple.

    They are there: whoever calls has seen them.  There is one sequence where there are any.
    """
    lines = ()
    for place in gl.static_range(S.depth - 1):
        line = (position + place) % S.page_positions
        for tile in gl.static_range(S.head_tiles):
            lines += (new_line(S, memory, step, head, gl.minimum(place, last), value, line, tile),)
    return lines


@gluon.jit
def patch(S: gl.constexpr, ring, slot, lines, first, position, used):
    """Put those of the step's own positions that the page in a slot has room for into it; it begins at position `first`."""
    page = reinterpret(ring.pages.index(slot), gl.bfloat16, [S.head_tiles * S.page_positions, TILE], FLAT_LINE)
    for place in gl.static_range(S.depth - 1):
        line = position + place - first
        if (place < used - 1) & (line >= 0) & (line < S.page_positions):
            for tile in gl.static_range(S.head_tiles):
                page.index(tile * S.page_positions + line).store(lines[place * S.head_tiles + tile])
    fence_async_shared()  # the next page comes into this slot by TMA
    barrier()


@gluon.jit
def land(S: gl.constexpr, ring, step, use, lines, first, position, used):
    """Wait for the page at a use, whose first position is `first`, and put what it lacks into it; returns its slot."""
    slot = wait_page(S, ring, use)
    if S.trace:
        if use == step.use:
            stamp(S, step.trace, LANDED)
    if S.depth > 1:
        if (used > 1) & (first + S.page_positions > position):
            patch(S, ring, slot, lines, first, position, used)
    return slot


@gluon.jit
def scores_of(S: gl.constexpr, ring, slot, part: gl.constexpr, WIDE: gl.constexpr, first, positions):
    """Scores of the K page in a slot and part `part` of the queries, fp32 [positions, queries]; -inf where a query's own
    position is no later."""
    MMA: gl.constexpr = score_layout()
    PARTS: gl.constexpr = S.attention_columns // WIDE
    queries = reinterpret(ring.staging, gl.bfloat16, [PARTS, WIDE, S.head_tiles, TILE], FLAT_HEADS).index(part)
    qt = queries.permute([1, 2, 0]).load(gl.DotOperandLayout(1, MMA, 2))
    k = reinterpret(ring.pages.index(slot), gl.bfloat16, [S.head_tiles, S.page_positions, TILE], PAGE_LAYOUT)
    nothing = gl.zeros([S.head_tiles, S.page_positions, WIDE], gl.float32, MMA)
    s = mma_v2(k.load(gl.DotOperandLayout(0, MMA, 2)), qt, nothing)
    rows = gl.arange(0, S.page_positions, gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    seen = (first + rows)[:, None] < positions[None, :]
    return gl.where(seen, gl.sum(s, axis=0) * S.scale, float("-inf"))


@gluon.jit
def add_rows(S: gl.constexpr, ring, slot, p, acc):
    """`acc` and the rows of the V page in a slot, weighted by p, bf16 [positions, queries]."""
    MMA: gl.constexpr = score_layout()
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    weights = gl.convert_layout(gl.expand_dims(p, 0), B)
    weights, _ = gl.broadcast(weights, gl.zeros([S.head_tiles, S.page_positions, p.shape[1]], gl.bfloat16, B))
    v = reinterpret(ring.pages.index(slot), gl.bfloat16, [S.head_tiles, S.page_positions, TILE], PAGE_LAYOUT)
    return mma_v2(v.permute([0, 2, 1]).load(gl.DotOperandLayout(0, MMA, 2)), weights, acc)


@gluon.jit
def add_page(S: gl.constexpr, ring, step, use, lines, first, position, used, weights, acc):
    """All of `acc`, a tuple, and the rows of the V page at a use, weighted; takes and releases the page."""
    slot = land(S, ring, step, use, lines, first, position, used)
    added = ()
    for part in gl.static_range(len(acc)):
        added += (add_rows(S, ring, slot, weights[part], acc[part]),)
    release(ring, slot)
    return added


@gluon.jit
def in_parts(values, PARTS: gl.constexpr):
    """A vector in one or two parts, as a tuple."""
    if PARTS == 1:
        parts = (values,)
    else:
        low, high = gl.split(gl.permute(gl.reshape(values, [PARTS, values.shape[0] // PARTS]), [1, 0]))
        LAYOUT: gl.constexpr = values.type.layout
        parts = (gl.convert_layout(low, LAYOUT), gl.convert_layout(high, LAYOUT))
    return parts


@gluon.constexpr_function
def queries_together(count):
    """How many queries are multiplied at a time: what registers hold beside the sums of all."""
    return min(count, 16)


@gluon.jit
def weight_of(scores, m):
    """exp(scores - m), 0 where nothing has been seen at all."""
    return gl.exp(scores - gl.where(m == float("-inf"), 0.0, m))


@gluon.jit
def attend_columns(S: gl.constexpr, memory, ring, step, head, slice, start):
    """KV head `head`, slice `slice`, for `attention_width` columns from `start` on; page uses beyond the slice's pages pass
    through empty."""
    MMA: gl.constexpr = score_layout()
    QUERIES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, MMA))
    DIMS: gl.constexpr = S.head_tiles * TILE
    COUNT: gl.constexpr = S.attention_columns
    WIDE: gl.constexpr = queries_together(COUNT)
    PARTS: gl.constexpr = COUNT // WIDE
    sequence = start // S.depth
    last = start + S.attention_width - 1

    wait_all(S, memory, step, ALL)
    position = first_position(S, memory, sequence)  # on their way together with the queries
    used = gl.load(progress(memory, sequence) + USED, cache_modifier=".cg")
    slices = slices_of(S, memory, sequence)
    columns, heads = column_of(S, gl.arange(0, COUNT, gl.SliceLayout(1, query_layout())), start)
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, query_layout()))
    known = (heads < S.group)[:, None] & (dims < S.head_rows)[None, :]
    query = rows_of(S, memory, step, S.q, step.record.layer) + head * (S.group * S.head_rows)
    query = query + (columns * S.q.column + heads * S.head_rows)[:, None] + dims[None, :]
    if S.head_norm.first >= 0:
        normed = (heads < S.group)[:, None] & (dims < S.head_blocks)[None, :]
    begin, waiting = cycles(), 1
    q = gl.full([COUNT, DIMS], 0.0, gl.float32, query_layout())
    new_k, squares, key_squares = q, q, q
    key = rows_of(S, memory, step, S.new_kv, step.record.layer) + head * (2 * S.head_rows)
    key_rows = key + columns[:, None] * S.new_kv.column + dims[None, :]
    every = gl.arange(0, MMA_COLUMNS, gl.SliceLayout(1, query_layout()))
    until = gl.minimum(every + sequence * S.depth, last)  # the columns that stand before the last one, and that one
    keys_before = key + until[:, None] * S.new_kv.column + dims[None, :]
    whole = (dims < S.head_rows)[None, :]
    while waiting != 0:
        q, new_k, new_v = look(query, known), look(key_rows, known), look(keys_before + S.head_rows, whole)
        missing, missing_lines = absent(q) | absent(new_k), absent(new_v)
        if S.attention_width < S.depth:  # else the columns' own keys are all that there are
            missing_lines = missing_lines | absent(look(keys_before, whole))
        if S.head_norm.first >= 0:
            squares = column_squares(S, memory, step, head, columns[:, None], dims[None, :], heads[:, None], normed)
            key_squares = column_squares(S, memory, step, head, columns[:, None], dims[None, :], S.group, normed)
            missing = missing | absent(squares) | absent(key_squares)
        if COUNT == MMA_COLUMNS:
            waiting = look_again(memory, step, begin, missing | missing_lines)
        else:
            waiting = look_again(memory, step, begin, missing) | look_again(memory, step, begin, missing_lines)
    first, pages = slice_pages(S, slices, slice, position + used - 1)
    current = slice == slices - 1
    if S.head_norm.first >= 0:
        q *= head_factor(S, gl.sum(squares, axis=1))[:, None]
        new_k *= head_factor(S, gl.sum(key_squares, axis=1))[:, None]
    q, new_k = rounded(q), rounded(new_k)
    reinterpret(ring.staging, gl.bfloat16, [1, COUNT, DIMS], FLAT_TILES).index(0).store(q.to(gl.bfloat16))
    barrier()
    keys = new_lines(S, memory, step, head, last, 0, position)
    values = new_lines(S, memory, step, head, last, 1, position)
    own_lines = gl.minimum(used, last + 1 - sequence * S.depth)
    own = gl.convert_layout(gl.sum(q * new_k, axis=1), QUERIES)  # scores of the columns' own positions, not yet scaled
    owns = in_parts(own, PARTS)
    stamp(S, step.trace, STAGED)

    m, totals, acc, positions, news = (), (), (), (), ()
    for part in gl.static_range(PARTS):
        columns_here, heads_here = column_of(S, part * WIDE + gl.arange(0, WIDE, QUERIES), start)
        positions += (position + gl.minimum(columns_here - sequence * S.depth, used - 1),)
        if PARTS == 1:  # on their way while the pages are multiplied; of more queries there are no registers for them
            news += (own_values(S, memory, step, head, columns_here, heads_here, current),)
        m += (gl.full([WIDE], float("-inf"), gl.float32, QUERIES),)
        totals += (gl.zeros([S.page_positions, WIDE], gl.float32, gl.SliceLayout(0, MMA)),)
        acc += (gl.zeros([S.head_tiles, TILE, WIDE], gl.float32, MMA),)
    for i in range(0, pages, 2):  # in pairs, as one column takes them
        use, here = step.use + 2 * i, (first + i) * S.page_positions
        after = here + S.page_positions
        both = i + 1 < pages
        slot = land(S, ring, step, use, keys, here, position, own_lines)
        next_slot = slot
        if both:
            next_slot = land(S, ring, step, use + 2, keys, after, position, own_lines)
        m_new, totals_new, scaled, weights, weights_after = (), (), (), (), ()
        for part in gl.static_range(PARTS):
            s = scores_of(S, ring, slot, part, WIDE, here, positions[part])
            t = gl.full([S.page_positions, WIDE], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
            if both:
                t = scores_of(S, ring, next_slot, part, WIDE, after, positions[part])
            top = gl.maximum(m[part], gl.max(gl.maximum(s, t), axis=0))
            decay = weight_of(m[part], top)
            p, r = weight_of(s, gl.expand_dims(top, 0)), weight_of(t, gl.expand_dims(top, 0))
            totals_new += (totals[part] * gl.expand_dims(decay, 0) + (p + r),)
            m_new += (top,)
            scaled += (acc[part] * gl.expand_dims(gl.expand_dims(decay, 0), 0),)
            weights += (p.to(gl.bfloat16),)
            weights_after += (r.to(gl.bfloat16),)
        release(ring, slot)
        if both:
            release(ring, next_slot)
        m, totals = m_new, totals_new
        acc = add_page(S, ring, step, use + 1, values, here, position, own_lines, weights, scaled)
        if both:
            acc = add_page(S, ring, step, use + 3, values, after, position, own_lines, weights_after, acc)
    for use in range(step.use + 2 * pages, step.use + step.record.pages):
        slot = wait_page(S, ring, use)
        release(ring, slot)
    stamp(S, step.trace, COMPUTED)
    for part in gl.static_range(PARTS):
        columns_here, heads_here = column_of(S, part * WIDE + gl.arange(0, WIDE, QUERIES), start)
        top, total, out = m[part], gl.sum(totals[part], axis=0), acc[part]
        if current:
            if PARTS == 1:
                v = news[part]
            else:
                v = own_values(S, memory, step, head, columns_here, heads_here, current)
            top, total, out = add_own(S, rounded(v), owns[part], top, total, out)
        if memory.bucket.slices == 1:
            store_queries(S, memory, step, head, columns_here, heads_here, out / gl.expand_dims(gl.expand_dims(total, 0), 0))
        else:
            store_slice(S, memory, step, head, slice, columns_here, heads_here, top, total, out)
    if S.head_norm.first >= 0:
        place = (position + gl.minimum(columns - sequence * S.depth, used - 1))[:, None]
        cached = cache_address(S, memory.cache, memory.bucket.head_pages, step.record.layer, head, 0, place, dims[None, :])
        cached = sequence_rows(S, memory, cached, columns[:, None])
        inside = known & (heads == 0)[:, None] & (slice == memory.bucket.slices - 1)
        lasting = caches(S, memory, columns[:, None], inside)
        gl.store(cached, finite(new_k).to(gl.bfloat16), mask=lasting)
        proxy_fence()  # later steps read these rows by TMA


@gluon.jit
def own_values(S: gl.constexpr, memory, step, head, columns, heads, current):
    """The values of the columns' own positions where they are needed, fp32 like the accumulators; they are there: whoever calls
    has seen them."""
    place = rows_of(S, memory, step, S.new_kv, step.record.layer) + head * (2 * S.head_rows) + S.head_rows
    rows = output_dims(S)
    wide = gl.expand_dims(gl.expand_dims(columns, 0), 0)
    inside = (rows < S.head_rows) & (gl.expand_dims(gl.expand_dims(heads, 0), 0) < S.group)
    return look(place + wide * S.new_kv.column + rows, inside & current)


@gluon.jit
def add_own(S: gl.constexpr, v, own, m, total, acc):
    """Take in each column's own position, whose values are `v`; all in fp32."""
    own = own * S.scale  # here, as one column has it: the product may be fused with the difference below
    m_new = gl.maximum(m, own)
    decay, p = gl.exp(m - m_new), gl.exp(own - m_new)
    weight = gl.expand_dims(gl.expand_dims(p.to(gl.bfloat16).to(gl.float32), 0), 0)
    return m_new, total * decay + p, acc * gl.expand_dims(gl.expand_dims(decay, 0), 0) + weight * v


@gluon.jit
def store_queries(S: gl.constexpr, memory, step, head, columns, heads, out):
    """The normalised output of some queries to "attn", each column's to its own rows."""
    rows = output_dims(S)
    columns, heads = gl.expand_dims(gl.expand_dims(columns, 0), 0), gl.expand_dims(gl.expand_dims(heads, 0), 0)
    place = place_of(S.o.format, ((head * S.group + heads) * S.head_rows + rows) // 2)
    target = rows_of(S, memory, step, S.attn, step.record.layer) + columns * S.o.columns + place
    put(S, step, target, paired(out, rows), (heads < S.group) & (rows < S.head_rows) & (rows % 2 == 0))


@gluon.jit
def store_slice(S: gl.constexpr, memory, step, head, slice, columns, heads, m, total, acc):
    """m, l and o of one slice of several to "partial", each column's to its own rows."""
    rows = output_dims(S)
    wide = gl.expand_dims(gl.expand_dims(columns, 0), 0)
    wide_heads = gl.expand_dims(gl.expand_dims(heads, 0), 0)
    inside = (rows < S.head_rows) & (wide_heads < S.group)
    slices = memory.bucket.slices
    ROWS: gl.constexpr = S.group * (S.head_rows + 2)
    second = memory.bucket.partial_second
    target = partials_of(S, memory, step) + (head * slices + slice) * ROWS
    distance = S.kv_heads * slices * ROWS
    once = (heads < S.group) & in_first_warp()
    put_apart(step, second, target + columns * distance + heads, m, once)
    put_apart(step, second, target + columns * distance + S.group + heads, total, once)
    outputs = target + wide * distance + 2 * S.group + wide_heads * S.head_rows + rows
    put_apart(step, second, outputs, acc, inside)
