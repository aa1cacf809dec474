"""The consumer: four warps that interpret one SM's queue, token after token."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from instructions.registry import INSTRUCTIONS
from megakernel.device.attention import attention
from megakernel.device.choose import choose
from megakernel.device.columns.places import over
from megakernel.device.combine import combine
from megakernel.device.compat import barrier
from megakernel.device.context import FAULT, Step, fetch, record_of, set_shared_word
from megakernel.device.down import down
from megakernel.device.embed import embed
from megakernel.device.expert_down import expert_down
from megakernel.device.expert_gate_up import expert_gate_up
from megakernel.device.gate_up import gate_up
from megakernel.device.hand_over import hand_over
from megakernel.device.lm_head import lm_head
from megakernel.device.o_proj import o_proj
from megakernel.device.pages import release
from megakernel.device.qkv import qkv
from megakernel.device.router import router
from megakernel.device.sample import sample
from megakernel.device.sync import agree, load_acquire, signal_all, wait_counter
from megakernel.device.trace import (
    BEGIN_CYCLE,
    BEGIN_TIME,
    END_CYCLE,
    END_TIME,
    FETCHED,
    POINTS,
    SIGNALLED,
    STORED,
    note_clocks,
    stamp,
    token_stamps,
)

EMBED, QKV, ATTENTION, COMBINE, O_PROJ, GATE_UP, DOWN, LM_HEAD, SAMPLE, HAND_OVER, *_MIXTURE = (
    gl.constexpr(kind.OPCODE) for kind in INSTRUCTIONS
)
ROUTER, CHOOSE, EXPERT_GATE_UP, EXPERT_DOWN = _MIXTURE


@gluon.jit
def execute_mixture(S: gl.constexpr, memory, ring, step):
    """Dispatch one record of a mixture of experts, where it is one."""
    opcode = step.record.opcode
    if opcode == ROUTER:
        router(S, memory, ring, step)
    elif opcode == CHOOSE:
        choose(S, memory, ring, step)
    elif opcode == EXPERT_GATE_UP:
        expert_gate_up(S, memory, ring, step)
    elif opcode == EXPERT_DOWN:
        expert_down(S, memory, ring, step)


@gluon.jit
def execute(S: gl.constexpr, memory, ring, step):
    """Dispatch one record."""
    opcode = step.record.opcode
    if opcode == QKV:
        qkv(S, memory, ring, step)
    elif opcode == ATTENTION:
        attention(S, memory, ring, step)
    elif opcode == COMBINE:
        combine(S, memory, ring, step)
    elif opcode == O_PROJ:
        o_proj(S, memory, ring, step)
    elif opcode == GATE_UP:
        if S.experts.total == 0:
            gate_up(S, memory, ring, step)
    elif opcode == DOWN:
        if S.experts.total == 0:
            down(S, memory, ring, step)
    elif opcode == LM_HEAD:
        lm_head(S, memory, ring, step)
    elif opcode == SAMPLE:
        sample(S, memory, ring, step)
    elif opcode == EMBED:
        embed(S, memory, ring, step)
    elif opcode == HAND_OVER:
        hand_over(S, memory, ring, step)
    if S.experts.total > 0:
        execute_mixture(S, memory, ring, step)


@gluon.jit
def run_token(S: gl.constexpr, memory, ring, record, sm, start, stop, first, first_use, position, epoch, trace):
    """Every record of the queue, once, the first already fetched; returns the next token's first.

    `first` is the first record's number, counted from the launch: the loader is told what number has been reached,
    the prefetcher what is being done.
    """
    for index in range(start, stop):
        following = fetch(memory, gl.where(index + 1 < stop, index + 1, start))
        here = trace + index * POINTS
        stamp(S, here, FETCHED)
        set_shared_word(ring.reached, first + index - start)
        set_shared_word(ring.doing, record.opcode)
        execute(S, memory, ring, Step(record, sm, index - start, first_use + record.page, position, epoch, here))
        stamp(S, here, STORED)
        signal_all(memory, record)
        stamp(S, here, SIGNALLED)
        record = record_of(following)
    return record


@gluon.jit
def drain_token(S: gl.constexpr, ring, first_use, uses):
    """Take every page that the loader streams for a token that is not to be decoded."""
    for use in range(first_use, first_use + uses):
        slot = use % S.ring
        mbarrier.wait(ring.full.index(slot), (use // S.ring) & 1)
        release(ring, slot)


@gluon.jit
def consumer(S: gl.constexpr, memory, ring, start, stop, uses_per_token, position, epoch, tokens):
    """Decode `tokens` tokens, or until one of them is a stop token or some wait of the grid has expired."""
    sm = gl.program_id(0)
    note_clocks(S, memory, sm, BEGIN_TIME, BEGIN_CYCLE)
    record = record_of(fetch(memory, start))
    token = 0
    while token < tokens:
        here = position + token
        mbarrier.wait(ring.begun, token & 1)
        if token > 0:
            wait_counter(
                memory, memory.bucket.end_counter, epoch + token, sm, -1, here
            )  # the last instruction alone signals it
        stopped = over(S, memory, here) | (load_acquire(memory.control + FAULT) != 0)
        last = agree(stopped.to(gl.int32))
        set_shared_word(ring.last, last)
        barrier()
        mbarrier.arrive(ring.taken, count=1)
        if last == 0:
            first_use = token * uses_per_token
            trace = token_stamps(S, memory, token)
            first = token * (stop - start)
            record = run_token(S, memory, ring, record, sm, start, stop, first, first_use, here, epoch + token, trace)
            token += 1
        else:
            drain_token(S, ring, token * uses_per_token, uses_per_token)
            token = tokens
    note_clocks(S, memory, sm, END_TIME, END_CYCLE)
