"""Device side of `instructions.qkv`: norm + QKV + RoPE + KV append."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.cache import cache_address, finite
from megakernel.device.columns.places import caches, in_column, kept, position_of, sequence_rows
from megakernel.device.matvec import ROWS, block_index, halves, layer_constants, row_block, stage_norm
from megakernel.device.sync import proxy_fence
from megakernel.device.values import put_once, rows_of, values_of


@gluon.jit
def rotate(low, high, cosine, sine):
    """The two halves of RoPE pairs, turned by an angle.

    Which of two products is rounded before they are added is said here: left to the compiler, it could be the one for one
    column and the other for several, and bits would differ.
    """
    return gl.fma(low, cosine, -(high * sine)), gl.fma(low, sine, high * cosine)


@gluon.jit
def put_squares(S: gl.constexpr, memory, step, place, low, high):
    """Store the sum of squares of a row block, two [8, 8], for those who read its head."""
    columns = gl.arange(0, low.shape[1], gl.SliceLayout(0, low.type.layout))
    squares = gl.sum(gl.fma(low, low, high * high), axis=0)
    target = rows_of(S, memory, step, S.squares, step.record.layer) + place
    put_once(S, step, in_column(S, target + columns, columns, S.squares.column - 1), squares, kept(S, columns))


@gluon.jit
def qkv(S: gl.constexpr, memory, ring, step):
    """Row blocks `block` to `block + blocks` of the layer's QKV matrix."""
    HALF: gl.constexpr = ROWS // 2
    CACHED: gl.constexpr = S.group if S.head_norm.first < 0 else S.group + 1  # `attention` caches keys that are normed
    layer = step.record.layer
    index, index_high = halves(block_index(S))
    row, column = index // 16, index % 16  # rows 0 to 7 of the block; index_high has the same rows, 8 further
    position = position_of(S, memory, step, column)
    inside = kept(S, column)
    lasting = caches(S, memory, column, inside)
    stage_norm(
        S,
        memory,
        ring,
        step,
        rows_of(S, memory, step, S.x, layer),
        S.x,
        layer_constants(memory, S.qkv.norm, layer),
        S.qkv,
    )
    block, blocks = step.record.a, step.record.b
    for i in range(blocks):
        here = block + i
        slot, inner = here // S.head_blocks, here % S.head_blocks
        head, part = slot // (S.group + 2), slot % (S.group + 2)
        pair = inner * HALF + row
        angle = memory.rope + (position * (S.head_rows // 2) + pair) * 2
        cosine, sine = gl.load(angle), gl.load(angle + 1)
        if S.qkv.bias.first >= 0:  # on their way while the row block is multiplied, as the weights
            bias = layer_constants(memory, S.qkv.bias, layer) + here * ROWS + row
            low_bias, high_bias = gl.load(bias), gl.load(bias + HALF)
        if S.head_norm.first >= 0:
            normed = part <= S.group  # a query or key; the factor of the whole head is the reader's business
            place = part // S.group
            if S.norms_together:  # weights of every head
                place = gl.where(part < S.group, head * S.group + part, S.kv_heads * S.group + head)
            weight = layer_constants(memory, S.head_norm, layer) + place * S.head_rows + inner * ROWS + row
            low_weight = gl.load(weight, mask=normed, other=1.0)
            high_weight = gl.load(weight + HALF, mask=normed, other=1.0)
        low, high = halves(row_block(S, ring, step, step.use + i * S.qkv.pages, S.qkv))
        if S.qkv.bias.first >= 0:
            low += low_bias
            high += high_bias
        if S.head_norm.first >= 0:
            if part <= S.group:
                put_squares(S, memory, step, (head * (S.group + 1) + part) * S.head_blocks + inner, low, high)
            low *= low_weight
            high *= high_weight
        if part <= S.group:  # a query or key: rotate its pairs
            low, high = rotate(low, high, cosine, sine)
        target = values_of(S, memory, step)
        if part < S.group:
            target += S.q.first + layer * S.q.stride + (head * S.group + part) * S.head_rows
        else:
            target += S.new_kv.first + layer * S.new_kv.stride + (head * 2 + part - S.group) * S.head_rows
        if S.columns == 1:
            put_once(S, step, target + inner * ROWS + row, low, inside)
            put_once(S, step, target + inner * ROWS + row + HALF, high, inside)
        else:
            rows = target + inner * ROWS + row + column * gl.where(part < S.group, S.q.column, S.new_kv.column)
            put_once(S, step, rows, low, inside)
            put_once(S, step, rows + HALF, high, inside)
        if part >= CACHED:
            cached = cache_address(
                S, memory.cache, memory.bucket.head_pages, layer, head, part - S.group, position, inner * ROWS + row
            )
            cached = sequence_rows(S, memory, cached, column)
            gl.store(cached, finite(low).to(gl.bfloat16), mask=lasting)
            gl.store(cached + HALF, finite(high).to(gl.bfloat16), mask=lasting)
            proxy_fence()  # later tokens read these rows by TMA
