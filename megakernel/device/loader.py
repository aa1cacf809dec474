"""The loader: one warp that streams pages into the ring, ahead of the consumer and across tokens.

It waits for a free page, for older copies to land, and, where the page plan could not prove it needless, for the previous
token's K/V rows; never for an activation, but for the numbers of the experts whose pages it streams.  The ring is deep but few
copies are in flight, fewer where the loader is ahead of the record that its consumer runs: so the SMs that lag get more of HBM,
and all come to a dependency together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from instructions.attention import Attention
from instructions.expert_down import ExpertDown
from instructions.expert_gate_up import ExpertGateUp
from instructions.lm_head import LmHead
from megakernel.device.clocks import cycles
from megakernel.device.columns.places import first_position, progress, slices_of
from megakernel.device.compat import copy_page
from megakernel.device.context import (
    DONE,
    LAYER,
    LOADERS,
    PAYLOAD,
    RECORD,
    USED,
    fetch_load,
    set_shared_word,
    shared_word,
    word,
)
from megakernel.device.experts import chosen_expert, look_for_choice
from megakernel.device.heads import slice_pages
from megakernel.device.matvec import LINES
from megakernel.device.sync import proxy_fence, wait_counter
from megakernel.device.trace import LOAD_BEGUN, LOAD_ENDED, LOAD_WAITED, POINTS, note, stamp, token_stamps
from models.tape import PAGE_BYTES

ATTENTION = gl.constexpr(Attention.OPCODE)
EXPERT_GATE_UP, EXPERT_DOWN = gl.constexpr(ExpertGateUp.OPCODE), gl.constexpr(ExpertDown.OPCODE)
LM_HEAD = gl.constexpr(LmHead.OPCODE)
BYTES = gl.constexpr(PAGE_BYTES)


@gluon.jit
def in_flight(S: gl.constexpr, ring, number):
    """How many copies may be in flight when the next is of record `number`."""
    return gl.where(number <= shared_word(ring.reached), S.copies_now, S.copies_ahead)


@gluon.jit
def free_slot(S: gl.constexpr, ring, use, number):
    """Wait until a page use may be filled and enough older copies have landed; returns its slot, and the time waited for
    the page where there is a trace."""
    slot = use % S.ring
    waited = gl.to_tensor(0).to(gl.int64)
    if S.trace:
        waited -= cycles()
    set_shared_word(ring.loading, use)
    mbarrier.wait(ring.empty.index(slot), ((use // S.ring) & 1) ^ 1)
    set_shared_word(ring.loading, -1 - use)
    if S.trace:
        waited += cycles()
    older = use - in_flight(S, ring, number)
    if older >= 0:
        mbarrier.wait(ring.full.index(older % S.ring), (older // S.ring) & 1)
    return slot, waited


@gluon.jit
def stream(S: gl.constexpr, ring, source, page, use, number):
    """Copy one page of record `number` into the ring; returns the time waited for it."""
    slot, waited = free_slot(S, ring, use, number)
    mbarrier.expect(ring.full.index(slot), BYTES)
    copy_page(source, [page * LINES, 0], ring.full.index(slot), ring.pages.index(slot))
    return waited


@gluon.jit
def stream_weights(S: gl.constexpr, F: gl.constexpr, ring, tape, beside, first, page, use, number):
    """Copy one page of weights of record `number` into the ring, of format F, with what lies beside it, counted from page
    `first` of the tape; returns the time waited for it."""
    slot, waited = free_slot(S, ring, use, number)
    mbarrier.expect(ring.full.index(slot), BYTES + F.BESIDE)
    copy_page(tape[0], [page * LINES, 0], ring.full.index(slot), ring.pages.index(slot))
    F.copy_beside(S, beside, ring, page - first, slot)
    return waited


@gluon.jit
def stream_half(S: gl.constexpr, ring, halves, page, use, number):
    """Copy the first half of a page of weights of record `number` into the ring; returns the time waited for it.

    The page's other half is zeros, and so is the activation's: what is left in its place, by an older page or from the
    beginning, takes nothing from the product, because it is numbers.
    """
    slot, waited = free_slot(S, ring, use, number)
    mbarrier.expect(ring.full.index(slot), BYTES // 2)
    copy_page(halves, [page * LINES, 0], ring.full.index(slot), ring.pages.index(slot).slice(0, LINES // 2))
    return waited


@gluon.jit
def stream_matrix(S: gl.constexpr, F: gl.constexpr, tape, beside, first, ring, load, use, number):
    """The weight pages of one record, of format F; returns the time waited for free pages."""
    waited = gl.to_tensor(0).to(gl.int64)
    for i in range(load.pages):
        waited += stream_weights(S, F, ring, tape, beside, first, load.tape + i, use + i, number)
    return waited


@gluon.jit
def stream_tape(S: gl.constexpr, tape, beside, head_beside, ring, load, use, number):
    """The weight pages of one record; returns the time waited for free pages."""
    if S.head_apart:
        waited = gl.to_tensor(0).to(gl.int64)
        if load.opcode == LM_HEAD:
            waited = stream_matrix(S, S.head.format, tape, head_beside, S.head_first, ring, load, use, number)
        else:
            waited = stream_matrix(S, S.qkv.format, tape, beside, 0, ring, load, use, number)
    else:
        waited = stream_matrix(S, S.qkv.format, tape, beside, 0, ring, load, use, number)
    return waited


@gluon.jit
def stream_slots(
    S: gl.constexpr, tape, beside, ring, choice, first_slot, slots, apart, page, pages, use, number, HALVED: gl.constexpr
):
    """`pages` pages from `page` on of the expert of each of some slots, as if it were expert 0, whose matrices lie `apart`
    pages apart, of the last one half where HALVED; returns the time waited for free pages."""
    waited = gl.to_tensor(0).to(gl.int64)
    whole = pages
    if HALVED:
        whole = pages - 1
    for slot in range(slots):
        expert = chosen_expert(S, choice, first_slot + slot)
        here, first = page + expert * apart, use + slot * pages
        for i in range(whole):
            waited += stream_weights(S, S.qkv.format, ring, tape, beside, 0, here + i, first + i, number)
        if HALVED:
            waited += stream_half(S, ring, tape[1], here + whole, first + whole, number)
    return waited


@gluon.jit
def stream_chosen(S: gl.constexpr, memory, tape, beside, ring, load, use, number, epoch, position, sm, at, index):
    """The pages of one record of the chosen experts; returns the time waited for free pages.

    The choice is looked for once the first page may be filled: then no older one can be taken for it.
    """
    if load.wait >= 0:
        wait_counter(memory, load.wait, load.target * epoch, LOADERS + sm, index, position)
    record = memory.words + at * RECORD
    layer, block = word(record, LAYER), word(record, PAYLOAD)
    _, waited = free_slot(S, ring, use, number)
    choice = look_for_choice(S, memory, layer, epoch, sm, index, position)
    if load.opcode == EXPERT_GATE_UP:
        slot = block // S.experts.blocks
        waited += stream_slots(
            S, tape, beside, ring, choice, slot, 1, S.experts.gate_up_apart, load.tape, load.pages, use, number, False
        )
    else:
        for i in range(load.pages // S.expert_down.pages):
            page = load.tape + i * S.experts.down_pages
            first = use + i * S.expert_down.pages
            waited += stream_slots(
                S,
                tape,
                beside,
                ring,
                choice,
                0,
                S.experts.chosen,
                S.experts.down_apart,
                page,
                S.experts.down_pages,
                first,
                number,
                S.experts.down_halved,
            )
    return waited


@gluon.jit
def stream_mixture(S: gl.constexpr, memory, tape, beside, head_beside, ring, load, use, number, epoch, position, sm, at, index):
    """The weight pages of one record of a model with experts; returns the time waited for free pages."""
    waited = gl.to_tensor(0).to(gl.int64)
    if (load.opcode == EXPERT_GATE_UP) | (load.opcode == EXPERT_DOWN):
        waited = stream_chosen(S, memory, tape, beside, ring, load, use, number, epoch, position, sm, at, index)
    else:
        waited = stream_tape(S, tape, beside, head_beside, ring, load, use, number)
    return waited


@gluon.jit
def where_it_stands(S: gl.constexpr, memory, ring, load, use):
    """The position of the last column of the sequence whose pages are to be streamed, and the slices of its attention.

    The step before has decided it.  Who fills page use `use` has seen the end of that step: by its own wait, or by the page's
    release, which an instruction of this step gives.
    """
    set_shared_word(ring.loading, use)
    mbarrier.wait(ring.empty.index(use % S.ring), ((use // S.ring) & 1) ^ 1)
    sequence = load.tape // (memory.bucket.head_pages * (S.layers * S.kv_heads * 2))
    used = gl.load(progress(memory, sequence) + USED, cache_modifier=".cg")
    return first_position(S, memory, sequence) + used - 1, slices_of(S, memory, sequence)


@gluon.jit
def stream_cache(S: gl.constexpr, memory, cache, ring, load, use, number, epoch, position, sm, index):
    """The K and V pages of one attention slice; page uses without a page pass through empty."""
    if load.wait >= 0:
        wait_counter(memory, load.wait, load.target * epoch, LOADERS + sm, index, position)
    proxy_fence()
    slices = memory.bucket.slices
    if S.columns > 1:
        position, slices = where_it_stands(S, memory, ring, load, use)
    first, pages = slice_pages(S, slices, load.slice, position)
    if S.columns > 1:
        pages = gl.minimum(pages, load.pages // 2)  # a step that will not be taken may stand beyond the bucket
    page = load.tape + first
    waited = gl.to_tensor(0).to(gl.int64)
    for i in range(pages):
        waited += stream(S, ring, cache, page + i, use + 2 * i, number)
        waited += stream(S, ring, cache, page + memory.bucket.head_pages + i, use + 2 * i + 1, number)
    for empty in range(use + 2 * pages, use + load.pages):
        slot, free = free_slot(S, ring, empty, number)
        mbarrier.arrive(ring.full.index(slot), count=1)
        waited += free
    return waited


@gluon.jit
def stream_token(
    S: gl.constexpr, memory, tape, beside, head_beside, cache, ring, load, start, stop, first, first_use, position, epoch, trace
):
    """The pages of every record, the first already fetched; returns the next token's first.

    `first` is the first record's number, counted from the launch.
    """
    sm = gl.program_id(0)
    for index in range(start, stop):
        following = fetch_load(memory, gl.where(index + 1 < stop, index + 1, start))
        here = trace + index * POINTS
        stamp(S, here, LOAD_BEGUN)
        use, number = first_use + load.page, first + index - start
        if load.opcode == ATTENTION:
            waited = stream_cache(S, memory, cache, ring, load, use, number, epoch, position, sm, index - start)
        else:
            if S.experts.total > 0:
                waited = stream_mixture(
                    S, memory, tape, beside, head_beside, ring, load, use, number, epoch, position, sm, index, index - start
                )
            else:
                waited = stream_tape(S, tape, beside, head_beside, ring, load, use, number)
        note(S, here, LOAD_WAITED, waited)
        stamp(S, here, LOAD_ENDED)
        load = following
    return load


@gluon.jit
def loader(
    S: gl.constexpr, memory, tape, beside, head_beside, cache, ring, start, stop, uses_per_token, position, epoch, tokens
):
    """Stream the pages of records start to stop, for `tokens` tokens or until the consumer takes its last.

    `tape` are the weights by pages and by halves of pages.
    """
    load = fetch_load(memory, start)
    token = 0
    while token < tokens:
        last = 0
        if token > 0:  # one token ahead of the consumer at most
            mbarrier.wait(ring.taken, (token - 1) & 1)
            last = shared_word(ring.last)
        if last == 0:
            mbarrier.arrive(ring.begun, count=1)
            first_use = token * uses_per_token
            trace = token_stamps(S, memory, token)
            first = token * (stop - start)
            here = position + token
            load = stream_token(
                S,
                memory,
                tape,
                beside,
                head_beside,
                cache,
                ring,
                load,
                start,
                stop,
                first,
                first_use,
                here,
                epoch + token,
                trace,
            )
            token += 1
        else:
            token = tokens
    set_shared_word(ring.loading, DONE)
