"""Queries and keys that are normed together, all heads of a token at once: after the product, which no tile has whole.

`megakernel.device.prefill.single` leaves the product in fp32, so nothing is rounded twice.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.cache import cache_address, finite
from megakernel.device.matvec import layer_constants
from megakernel.device.numbers import power_of_two
from megakernel.device.prefill.order import let_next_start, wait_for_previous
from megakernel.device.prefill.product import BLOCK, read_chunk
from megakernel.device.prefill.projections import HALF, Model
from megakernel.device.qkv import rotate

QUERIES, KEYS, VALUES = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
PAIRS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))


@gluon.jit
def tape_head(S: gl.constexpr, head, KIND: gl.constexpr):
    """Which head of the QKV matrix, as the tape has them, is a query, key or value head."""
    if KIND == QUERIES:
        return head // S.group * (S.group + 2) + head % S.group
    else:
        return head * (S.group + 2) + S.group + KIND - 1


@gluon.jit
def turned(S: gl.constexpr, model, chunk, row, low, high, pair):
    """Pairs of all heads turned by their angles; `pair` counts through the pairs of the heads."""
    angle = model.rope + ((chunk.start + row) * (S.head_rows // 2) + pair % (S.head_rows // 2)) * 2
    return rotate(low, high, gl.load(angle), gl.load(angle + 1))


@gluon.jit
def keep_heads(S: gl.constexpr, T: gl.constexpr, model, chunk, products, queries, layer, row, KIND: gl.constexpr):
    """A token's queries to their buffer, or its keys or values to the cache."""
    HEADS: gl.constexpr = S.kv_heads * (S.group if KIND == QUERIES else 1)
    COUNT: gl.constexpr = HEADS * (S.head_rows // 2)
    pair = gl.arange(0, power_of_two(COUNT), PAIRS)
    known = pair < COUNT
    pair = gl.minimum(pair, COUNT - 1)
    head = pair // (S.head_rows // 2)
    place = pair % (S.head_rows // 2) // HALF * BLOCK + pair % HALF
    packed = tape_head(S, head, KIND) * S.head_rows + place
    source = products + row * (T.blocks * BLOCK) + packed
    low = gl.load(source, mask=known, other=0.0)
    high = gl.load(source + HALF, mask=known, other=0.0)
    if S.qkv.bias.first >= 0:
        bias = layer_constants(model, S.qkv.bias, layer) + packed
        low += gl.load(bias, mask=known, other=0.0)
        high += gl.load(bias + HALF, mask=known, other=0.0)
    if KIND != VALUES:
        factor = gl.rsqrt(gl.sum(gl.fma(low, low, high * high), axis=0) / (HEADS * S.head_dim) + S.epsilon)
        FIRST: gl.constexpr = KIND * (S.kv_heads * S.group)
        weight = layer_constants(model, S.head_norm, layer) + (FIRST + head) * S.head_rows + place
        low *= factor * gl.load(weight)
        high *= factor * gl.load(weight + HALF)
        low, high = turned(S, model, chunk, row, low, high, pair)
    if KIND == QUERIES:
        target = queries + (row * T.heads + head) * T.head + place
    else:
        target = cache_address(S, model.cache, model.head_pages, layer, head, KIND - 1, chunk.start + row, place)
    gl.store(target, finite(low).to(gl.bfloat16), mask=known)
    gl.store(target + HALF, finite(high).to(gl.bfloat16), mask=known)


@gluon.jit(do_not_specialize=["layer", "head_pages"])
def read_heads(chunk, products, queries, constants, rope, cache, layer, head_pages, S: gl.constexpr, T: gl.constexpr):
    """products fp32 [chunk, packed rows of QKV] as `megakernel.device.prefill.projections.keep_qkv` keeps them."""
    let_next_start()
    chunk = read_chunk(chunk)
    model = Model(constants, rope, cache, head_pages)
    wait_for_previous()
    for row in range(gl.program_id(0), chunk.count, gl.num_programs(0)):
        for KIND in gl.static_range(3):
            keep_heads(S, T, model, chunk, products, queries, layer, row, KIND)
