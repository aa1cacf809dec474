"""Device side of `instructions.experts`: the choice as a loader looks for it, and all slots' activations as one vector."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.clocks import cycles
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.context import LOADERS, lanes
from megakernel.device.formats.layouts import staged
from megakernel.device.matvec import multiply_pages, vector_layout
from megakernel.device.numbers import largest_divisor, power_of_two
from megakernel.device.sums import sum_of
from megakernel.device.sync import LONG_WAIT, agree_in_warp, given_up, report_value
from megakernel.device.trace import COMPUTED, STAGED, stamp
from megakernel.device.values import look, look_again, vacant

LANES = gl.constexpr(32)


@gluon.constexpr_function
def places(slots):
    """Elements of a vector that holds a number for every slot: a warp's lanes, or more."""
    return max(LANES.value, 1 << (slots - 1).bit_length())


@gluon.jit
def look_for_choice(S: gl.constexpr, memory, layer, epoch, sm, index, position):
    """The experts that were chosen for a layer, int32 [places], slot by slot: looked for by one warp until all are there.

    A wait that expires gives whatever is there, within the experts that exist.
    """
    slot = gl.arange(0, places(S.experts.chosen), lanes(gl.num_warps()))
    source = memory.activations + (epoch & 1) * S.second + S.choice.first + layer * S.choice.stride
    values = look(source + slot, slot < S.experts.chosen)
    begin, waiting = cycles(), 1
    while waiting != 0:
        waiting = gl.max(vacant(values), axis=0)
        if waiting != 0:
            waited = cycles() - begin
            give_up = 0
            if waited > LONG_WAIT:
                if given_up(memory, waited):
                    report_value(memory, LOADERS + sm, index, position)
                    give_up = 1
            waiting = 1 - agree_in_warp(gl.to_tensor(give_up))
            values = look(source + slot, slot < S.experts.chosen)
    return gl.minimum(gl.maximum(values.to(gl.int32), 0), S.experts.total - 1)


@gluon.jit
def chosen_expert(S: gl.constexpr, choice, slot):
    """The number in one place of a choice."""
    place = gl.arange(0, places(S.experts.chosen), lanes(gl.num_warps()))
    return gl.sum(gl.where(place == slot, choice, 0), axis=0)


@gluon.jit
def multiply_slot(S: gl.constexpr, ring, step, use, slot):
    """The sums of the tiles of one slot's pages from `use` on, whose rows have scales of their own."""
    PAGES: gl.constexpr = S.experts.down_pages
    return multiply_pages(S, S.expert_down.format, ring, step, use, slot * PAGES, PAGES)


@gluon.jit
def multiply_slots(S: gl.constexpr, ring, step, use):
    """Multiply the next row block of the down projections by the staged activations; returns what `row_block` does."""
    F: gl.constexpr = S.expert_down.format
    sums = F.total(F.nothing())
    for slot in range(S.experts.chosen):
        sums += multiply_slot(S, ring, step, use + slot * S.experts.down_pages, slot)
    stamp(S, step.trace, COMPUTED)
    return sum_of(S, sums)


@gluon.jit
def stage_slots_and_multiply(S: gl.constexpr, memory, ring, step, source):
    """Round the slots' activations to bf16 and stage them, each padded with zeros to whole pages, as soon as they are there,
    and multiply the step's first row block of the down projections by them; returns what `row_block` does.

    A slot's vector is on its way from L2 while the slot before it is multiplied.
    """
    F: gl.constexpr = S.expert_down.format
    PAGES: gl.constexpr = S.experts.down_pages  # of one slot
    GROUP: gl.constexpr = largest_divisor(PAGES, F.TOGETHER)
    PARTS: gl.constexpr = PAGES // GROUP
    COUNT: gl.constexpr = S.expert_down.columns
    SIZE: gl.constexpr = power_of_two(GROUP) * F.COLUMNS
    column = gl.arange(0, SIZE, vector_layout())
    staging = reinterpret(ring.staging, gl.bfloat16, [S.experts.chosen * PARTS, SIZE], staged(F.STAGED, [SIZE]))
    sums = F.total(F.nothing())
    values = look(source + column, column < COUNT)
    begin = cycles()
    for part in range(S.experts.chosen * PARTS):
        here = source + part // PARTS * COUNT
        within = part % PARTS * SIZE + column
        waiting = look_again(memory, step, begin, vacant(values))
        while waiting != 0:
            values = look(here + within, within < COUNT)
            waiting = look_again(memory, step, begin, vacant(values))
        rounded = values.to(gl.bfloat16)
        staging.index(part).store(rounded)
        F.stage_sums(S, ring, part, rounded)
        barrier()
        if S.trace:
            if part == 0:
                stamp(S, step.trace, STAGED)
        following = part + 1
        within = following % PARTS * SIZE + column
        inside = (within < COUNT) & (following < S.experts.chosen * PARTS)
        values = look(source + following // PARTS * COUNT + within, inside)
        if following % PARTS == 0:
            slot = part // PARTS
            sums += multiply_slot(S, ring, step, step.use + slot * PAGES, slot)
    stamp(S, step.trace, COMPUTED)
    return sum_of(S, sums)
