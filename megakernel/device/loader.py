"""The loader: one warp that streams pages into the ring, ahead of the consumer and across tokens.

It waits for a free page, for older copies to land (a deep ring but few copies in flight), and, where the page plan could
not prove it needless, for the previous token's K/V rows; never for an activation.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from instructions.attention import Attention
from megakernel.device.attention import slice_pages
from megakernel.device.compat import copy_page
from megakernel.device.context import LOAD_TARGET, LOAD_WAIT, OPCODE, PAGE, PAGES, PAYLOAD, RECORD, TAPE, word
from megakernel.device.sync import proxy_fence, wait_counter
from models.tape import PAGE_BYTES

ATTENTION = gl.constexpr(Attention.OPCODE)
BYTES = gl.constexpr(PAGE_BYTES)
LINES = gl.constexpr(128)  # 128-byte lines of a page: rows of the TMA descriptor


@gluon.jit
def free_slot(S: gl.constexpr, ring, use):
    """Wait until a page use may be filled and enough older copies have landed; returns its slot."""
    slot = use % S.ring
    mbarrier.wait(ring.empty.index(slot), ((use // S.ring) & 1) ^ 1)
    if S.copies < S.ring:
        older = use - S.copies
        if older >= 0:
            mbarrier.wait(ring.full.index(older % S.ring), (older // S.ring) & 1)
    return slot


@gluon.jit
def stream(S: gl.constexpr, ring, source, page, use):
    """Copy one page into the ring."""
    slot = free_slot(S, ring, use)
    mbarrier.expect(ring.full.index(slot), BYTES)
    copy_page(source, [page * LINES, 0], ring.full.index(slot), ring.pages.index(slot))


@gluon.jit
def stream_cache(S: gl.constexpr, memory, cache, ring, record, use, uses, epoch, position, sm, index):
    """The K and V pages of one attention slice; page uses without a page pass through empty."""
    counter = word(record, LOAD_WAIT)
    if counter >= 0:
        wait_counter(memory, counter, word(record, LOAD_TARGET) * epoch, sm, index, position)
    proxy_fence()
    first, pages = slice_pages(S, word(record, PAYLOAD + 1), position)
    page = word(record, TAPE) + first
    for i in range(pages):
        stream(S, ring, cache, page + i, use + 2 * i)
        stream(S, ring, cache, page + S.head_pages + i, use + 2 * i + 1)
    for empty in range(use + 2 * pages, use + uses):
        slot = free_slot(S, ring, empty)
        mbarrier.arrive(ring.full.index(slot), count=1)


@gluon.jit
def loader(S: gl.constexpr, memory, tape, cache, ring, start, stop, uses_per_token, position, epoch, tokens):
    """Stream the pages of records start to stop, for `tokens` tokens or until the consumer takes its last."""
    sm = gl.program_id(0)
    token = 0
    while token < tokens:
        last = 0
        if token > 0:  # one token ahead of the consumer at most
            mbarrier.wait(ring.taken, (token - 1) & 1)
            last = gl.max(ring.last.load(gl.BlockedLayout([1], [32], [1], [0])), axis=0)
        if last == 0:
            mbarrier.arrive(ring.begun, count=1)
            first_use = token * uses_per_token
            for index in range(start, stop):
                record = memory.words + index * RECORD
                uses = word(record, PAGES)
                use = first_use + word(record, PAGE)
                if word(record, OPCODE) == ATTENTION:
                    stream_cache(S, memory, cache, ring, record, use, uses, epoch + token, position + token, sm, index - start)
                else:
                    page = word(record, TAPE)
                    for i in range(uses):
                        stream(S, ring, tape, page + i, use + i)
            token += 1
        else:
            token = tokens
