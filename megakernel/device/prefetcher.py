"""The prefetcher: one warp that keeps HBM busy while the loader waits for a free page.

While the grid passes short operations that depend on each other, the rings fill up and HBM would fall idle.  The prefetcher
then asks L2 for the pages that the loader will copy next.  It does so only where the consumer is at one of those operations:
one that waits for a long operation waits for SMs that still stream, and would take HBM from them.  All this is a hint: nothing
waits for it, and nothing that it does can be seen but in time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.attention import Attention
from instructions.expert_down import ExpertDown
from instructions.expert_gate_up import ExpertGateUp
from instructions.registry import INSTRUCTIONS
from instructions.router import Router
from megakernel.device.clocks import cycles
from megakernel.device.context import DONE, fetch_load, shared_word
from megakernel.device.matvec import PAGE_ELEMENTS
from models.tape import PAGE_BYTES

ATTENTION = gl.constexpr(Attention.OPCODE)
EXPERT_GATE_UP, EXPERT_DOWN = gl.constexpr(ExpertGateUp.OPCODE), gl.constexpr(ExpertDown.OPCODE)
# Bit n: opcode n is short, or waits for short ones alone.
SHORT = gl.constexpr(sum(1 << kind.OPCODE for kind in INSTRUCTIONS if kind.SHORT))
DENSE = gl.constexpr(SHORT.value & (1 << Router.OPCODE) - 1)  # of those that models without experts have
AHEAD = gl.constexpr(12)  # most pages beyond the one that the loader is at
DELAY = gl.constexpr(2000)  # clock cycles that the loader has waited for a page before the first is asked for
PACE = gl.constexpr(600)  # and from one to the next; HBM delivers one to every SM in about 1,300 (H100) or 900 (H200)

PREFETCH = gl.constexpr(f"""{{
    .reg .pred one;
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    setp.eq.u32 one, lane, 0;
    @one cp.async.bulk.prefetch.L2.global [$1], {PAGE_BYTES};
    mov.b32 $0, 0;
}}""")


@gluon.jit
def prefetch(memory, page):
    """Ask L2 for a page of the tape."""
    source = memory.weights + page.to(gl.int64) * PAGE_ELEMENTS
    gl.inline_asm_elementwise(PREFETCH, "=r,l", [source], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def nap():
    """Leave the issue slots to others for a moment."""
    gl.inline_asm_elementwise("nanosleep.u32 60; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def prefetcher(S: gl.constexpr, memory, ring, start, stop, uses_per_token):
    """Follow the loader through the queue, token after token, until it is done."""
    SHORTS: gl.constexpr = SHORT if S.experts.total > 0 else DENSE
    index, first_use = start, 0
    load = fetch_load(memory, start)
    page = 0  # of the record
    stalled, since = -1, cycles()
    loading = 0
    while loading != DONE:
        loading = shared_word(ring.loading)
        waits = loading >= 0
        copied = gl.where(waits, loading, -1 - loading)
        use = first_use + load.page
        unknown = load.opcode == ATTENTION
        if S.experts.total > 0:
            unknown = unknown | (load.opcode == EXPERT_GATE_UP) | (load.opcode == EXPERT_DOWN)
        if unknown | (use + load.pages <= copied) | (page >= load.pages):
            index += 1
            if index >= stop:
                index = start
                first_use += uses_per_token
            load = fetch_load(memory, index)
            page = 0
        else:
            page = gl.maximum(page, copied - use)
            now = cycles()
            if loading != stalled:
                stalled, since = loading, now + (DELAY - PACE)
            idle = waits & (((SHORTS >> shared_word(ring.doing)) & 1) != 0)
            if idle & (use + page < copied + AHEAD) & (now - since >= PACE):
                prefetch(memory, load.tape + page)
                page += 1
                since = now
            else:
                nap()
