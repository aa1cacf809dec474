"""Device side of `instructions.attention`: one KV head's query group over one slice of the context.

Scores: A = a K page as [tiles, positions, 64], B = the queries as [tiles, 64, heads].  Output: A = the V page transposed,
B = the probabilities [positions, heads].  The query heads fill the columns of the matrix instruction.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mma_v2

from megakernel.device.cache import cache_address, finite
from megakernel.device.clocks import cycles
from megakernel.device.columns.attention import attend_columns
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.formats.layouts import FLAT_TILES
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
from megakernel.device.numbers import power_of_two
from megakernel.device.opaque import nothing
from megakernel.device.pages import release
from megakernel.device.sync import ALL, proxy_fence, wait_all
from megakernel.device.trace import COMPUTED, LANDED, STAGED, stamp
from megakernel.device.values import (
    absent,
    any_missing,
    complete,
    in_first_warp,
    look,
    partials_of,
    patient,
    put,
    put_apart,
    rows_of,
    values_of,
)


@gluon.jit
def query_places(S: gl.constexpr, memory, step):
    """Where the group's queries lie, [heads, dims], and which of them there are.

    Beyond the group the last one is taken again: a mask is one of seven predicates, and where they are short a load waits for
    what the load before has brought.
    """
    DIMS: gl.constexpr = S.head_tiles * TILE
    heads = gl.arange(0, S.group_columns, gl.SliceLayout(1, query_layout()))[:, None]
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, query_layout()))[None, :]
    head = step.record.a
    source = rows_of(S, memory, step, S.q, step.record.layer) + head * (S.group * S.head_rows)
    return source + gl.minimum(heads, S.group - 1) * S.head_rows + dims, dims < S.head_rows


@gluon.jit
def squares_places(S: gl.constexpr, memory, step, current):
    """Where the sums of squares of the group's row blocks lie: of queries [heads, dims] and of the key [dims], a block in place
    of a dimension; beyond the group the last query's, and a query's in place of the key's where that is not taken in."""
    heads = gl.minimum(gl.arange(0, S.group_columns, gl.SliceLayout(1, query_layout())), S.group - 1)[:, None]
    blocks = gl.arange(0, S.head_tiles * TILE, gl.SliceLayout(0, query_layout()))
    source = rows_of(S, memory, step, S.squares, step.record.layer)
    head = step.record.a
    source += head * ((S.group + 1) * S.head_blocks)
    key = gl.where(current, S.group * S.head_blocks, 0)
    return source + heads * S.head_blocks + blocks[None, :], source + key + blocks


@gluon.constexpr_function
def whole_size(count):
    """Elements of a vector of so many values, one or more for each thread of a warp: no two hold the same."""
    return max(32, power_of_two(count))


@gluon.constexpr_function
def whole_layout(size):
    """A vector that every warp holds whole."""
    return gl.BlockedLayout([size // 32], [32], [4], [0])


@gluon.jit
def common_factors(S: gl.constexpr, memory, step):
    """What all queries are multiplied by to be normed together, and all keys, once all heads' sums of squares are there."""
    COUNT: gl.constexpr = S.kv_heads * (S.group + 1) * S.head_blocks
    place = gl.arange(0, whole_size(COUNT), whole_layout(whole_size(COUNT))) + nothing()
    source = rows_of(S, memory, step, S.squares, step.record.layer) + place
    squares = complete(memory, step, look(source, place < COUNT), source, place < COUNT)
    keys = place // S.head_blocks % (S.group + 1) == S.group
    of_keys = gl.sum(gl.where(keys, squares, 0.0), axis=0) / (S.kv_heads * S.head_dim)
    of_queries = gl.sum(gl.where(keys, 0.0, squares), axis=0) / (S.kv_heads * S.group * S.head_dim)
    return gl.rsqrt(of_queries + S.epsilon), gl.rsqrt(of_keys + S.epsilon)


@gluon.jit
def page_scores(S: gl.constexpr, ring, step, use, qt, left):
    """Scores of the K page at a use, fp32 [positions, heads], -inf from position `left` on; takes and releases the page."""
    MMA: gl.constexpr = score_layout()
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    slot = wait_page(S, ring, use)
    if S.trace:
        if use == step.use:
            stamp(S, step.trace, LANDED)
    k = reinterpret(ring.pages.index(slot), gl.bfloat16, [S.head_tiles, S.page_positions, TILE], PAGE_LAYOUT)
    s = mma_v2(k.load(A), qt, gl.zeros([S.head_tiles, S.page_positions, S.group_columns], gl.float32, MMA))
    release(ring, slot)
    positions = gl.arange(0, S.page_positions, gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    return gl.where((positions < left)[:, None], gl.sum(s, axis=0) * S.scale, float("-inf"))


@gluon.jit
def add_values(S: gl.constexpr, ring, use, p, acc):
    """`acc` and the rows of the V page at a use, weighted by p [positions, heads]; takes and releases the page."""
    MMA: gl.constexpr = score_layout()
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    weights = gl.convert_layout(gl.expand_dims(p.to(gl.bfloat16), 0), B)
    weights, _ = gl.broadcast(weights, gl.zeros([S.head_tiles, S.page_positions, S.group_columns], gl.bfloat16, B))
    slot = wait_page(S, ring, use)
    v = reinterpret(ring.pages.index(slot), gl.bfloat16, [S.head_tiles, S.page_positions, TILE], PAGE_LAYOUT)
    acc = mma_v2(v.permute([0, 2, 1]).load(A), weights, acc)
    release(ring, slot)
    return acc


@gluon.jit
def attention(S: gl.constexpr, memory, ring, step):
    """KV head `head`, slice `slice`, columns from `column` on; page uses beyond the slice's pages pass through empty."""
    head, slice, column = step.record.a, step.record.b, step.record.c
    if S.columns == 1:
        attend(S, memory, ring, step, slice)
    else:
        attend_columns(S, memory, ring, step, head, slice, column)


@gluon.jit
def attend(S: gl.constexpr, memory, ring, step, slice):
    """`attention` of one column."""
    MMA: gl.constexpr = score_layout()
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    HEADS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, MMA))
    DIMS: gl.constexpr = S.head_tiles * TILE
    COLUMNS: gl.constexpr = S.group_columns
    OWN_NORMS: gl.constexpr = S.head_norm.first >= 0 and not S.norms_together

    first, pages = slice_pages(S, memory.bucket.slices, slice, step.position)
    wait_all(S, memory, step, ALL)
    if S.norms_together:  # first, while few registers are taken
        query_factor, key_factor = common_factors(S, memory, step)
    current = slice == memory.bucket.slices - 1
    query, known = query_places(S, memory, step)
    new_k_place, new_v_place = current_places(S, memory, step, current)
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, query_layout()))
    inside = dims < S.head_rows
    here = current & inside
    q = gl.full(query.shape, 0.0, gl.float32, query.type.layout)
    new_k = gl.full(dims.shape, 0.0, gl.float32, dims.type.layout)
    if OWN_NORMS:
        query_blocks, key_blocks = squares_places(S, memory, step, current)
        normed = dims < S.head_blocks
        squares, key_squares = q, new_k
    begin, waiting = cycles(), 1
    while waiting != 0:
        if OWN_NORMS:
            squares, key_squares = look(query_blocks, normed[None, :]), look(key_blocks, normed)
        q, new_k, new_v = look(query, known), look(new_k_place + dims, inside), look(new_v_place + dims, inside)
        missing = absent(q) | (absent(new_k) | absent(new_v))[None, :]
        if OWN_NORMS:
            missing = missing | absent(squares) | absent(key_squares)[None, :]
        waiting = any_missing(missing)
        if waiting != 0:
            waiting = patient(memory, step, begin)
    if OWN_NORMS:
        q *= head_factor(S, gl.sum(squares, axis=1))[:, None]
        new_k *= head_factor(S, gl.sum(key_squares, axis=0))
    if S.norms_together:
        q *= query_factor
        new_k *= key_factor
    rows = output_dims(S)
    new_v = look(new_v_place + rows, rows < S.head_rows)  # is there, as has just been seen
    q, new_k = rounded(q), rounded(new_k)
    if S.head_norm.first >= 0:
        head = step.record.a
        cached = cache_address(S, memory.cache, memory.bucket.head_pages, step.record.layer, head, 0, step.position, dims)
        gl.store(cached, finite(new_k).to(gl.bfloat16), mask=here)
    reinterpret(ring.staging, gl.bfloat16, [1, COLUMNS, DIMS], FLAT_TILES).index(0).store(q.to(gl.bfloat16))
    barrier()
    queries = reinterpret(ring.staging, gl.bfloat16, [COLUMNS, S.head_tiles, TILE], FLAT_HEADS)
    qt = queries.permute([1, 2, 0]).load(B)
    stamp(S, step.trace, STAGED)

    m = gl.full([COLUMNS], float("-inf"), gl.float32, HEADS)
    totals = gl.zeros([S.page_positions, COLUMNS], gl.float32, gl.SliceLayout(0, MMA))
    acc = gl.zeros([S.head_tiles, TILE, COLUMNS], gl.float32, MMA)
    for i in range(0, pages, 2):  # two pages at a time: the largest score is a barrier, and the same for both
        use, left = step.use + 2 * i, step.position - (first + i) * S.page_positions
        both = i + 1 < pages
        s = page_scores(S, ring, step, use, qt, left)
        t = gl.full([S.page_positions, COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
        if both:
            t = page_scores(S, ring, step, use + 2, qt, left - S.page_positions)
        m_new = gl.maximum(m, gl.max(gl.maximum(s, t), axis=0))
        decay = gl.exp(m - m_new)
        p, r = gl.exp(s - gl.expand_dims(m_new, 0)), gl.exp(t - gl.expand_dims(m_new, 0))
        totals = totals * gl.expand_dims(decay, 0) + (p + r)  # summed over the positions at the end: a sum is a barrier, too
        m = m_new
        acc = add_values(S, ring, use + 1, p, acc * gl.expand_dims(gl.expand_dims(decay, 0), 0))
        if both:
            acc = add_values(S, ring, use + 3, r, acc)
    for use in range(step.use + 2 * pages, step.use + step.record.pages):
        slot = wait_page(S, ring, use)
        release(ring, slot)
    total = gl.sum(totals, axis=0)
    stamp(S, step.trace, COMPUTED)
    if current:
        m, total, acc = add_current(S, q, new_k, rounded(new_v), m, total, acc)
    store_output(S, memory, step, m, total, acc)
    if S.head_norm.first >= 0:
        proxy_fence()  # later tokens read these rows by TMA


@gluon.jit
def current_places(S: gl.constexpr, memory, step, current):
    """Where this token's K lies, and its V.

    Loaded together with the queries and used after the pages: the last slice alone takes them in.  The others are shown a query
    in their place, as `query_places` does beyond the group.
    """
    head = step.record.a
    values = values_of(S, memory, step)
    query = S.q.first + step.record.layer * S.q.stride + head * (S.group * S.head_rows)
    key = S.new_kv.first + step.record.layer * S.new_kv.stride + head * (2 * S.head_rows)
    return values + gl.where(current, key, query), values + gl.where(current, key + S.head_rows, query)


@gluon.jit
def add_current(S: gl.constexpr, q, k, v, m, total, acc):
    """Take in the current position; all in fp32."""
    HEADS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, score_layout()))
    s = gl.convert_layout(gl.sum(q * k[None, :], axis=1), HEADS) * S.scale
    m_new = gl.maximum(m, s)
    decay, p = gl.exp(m - m_new), gl.exp(s - m_new)
    weight = gl.expand_dims(gl.expand_dims(p.to(gl.bfloat16).to(gl.float32), 0), 0)
    return m_new, total * decay + p, acc * gl.expand_dims(gl.expand_dims(decay, 0), 0) + weight * v


@gluon.jit
def store_output(S: gl.constexpr, memory, step, m, total, acc):
    """The normalised output to "attn", or, of one slice of several, m, l and o to "partial"."""
    HEADS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, score_layout()))
    heads = gl.arange(0, S.group_columns, HEADS)
    columns = gl.expand_dims(gl.expand_dims(heads, 0), 0)
    rows = output_dims(S)
    inside = (rows < S.head_rows) & (columns < S.group)
    head, slice = step.record.a, step.record.b
    if memory.bucket.slices == 1:
        target = rows_of(S, memory, step, S.attn, step.record.layer)
        target += head * (S.group * S.head_rows)
        out = acc / gl.expand_dims(gl.expand_dims(total, 0), 0)
        put(S, step, target + columns * S.head_rows + rows, out, inside)
    else:
        ROWS: gl.constexpr = S.group * (S.head_rows + 2)
        second = memory.bucket.partial_second
        target = partials_of(S, memory, step) + (head * memory.bucket.slices + slice) * ROWS
        once = (heads < S.group) & in_first_warp()
        put_apart(step, second, target + heads, m, once)
        put_apart(step, second, target + S.group + heads, total, once)
        put_apart(step, second, target + 2 * S.group + columns * S.head_rows + rows, acc, inside)
