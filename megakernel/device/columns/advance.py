"""The end of a step of several columns: choose what follows each, keep what was decoded from true tokens, draft what may
follow.

A column's choice is that of its position, whoever shares the step.  What it was decoded from is true if it is what the column
before has chosen: so the text is the same with drafts and without.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.columns.places import progress, request, runs, sequence_of, token_stride, tokens_of
from megakernel.device.compat import barrier
from megakernel.device.context import (
    END,
    GIVEN,
    INVERSE_TEMPERATURE,
    LAST,
    NO_NUMBERS,
    POSITION,
    PROMPT_LENGTH,
    SOURCE,
    STEPS,
    STOP,
    STOP_TOKENS,
    TOP_K,
    TOP_P,
    USED,
)
from megakernel.device.drafts import continued, draft_layout, look_up
from megakernel.device.draws import draw
from megakernel.device.formats.layouts import MMA_COLUMNS
from megakernel.device.sampling import NO_ROW, load_sampling
from megakernel.device.sync import wait_all


@gluon.constexpr_function
def best_layout():
    """[columns, slots]: two columns a warp."""
    return gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])


@gluon.jit
def best_rows(S: gl.constexpr, memory, slots):
    """The best score of every column and the row that has it, [8]; beyond the columns the last one's."""
    L: gl.constexpr = best_layout()
    column = gl.minimum(gl.arange(0, MMA_COLUMNS, gl.SliceLayout(1, L)), S.columns - 1)
    slot = gl.minimum(gl.arange(0, S.best_slots, gl.SliceLayout(0, L)), slots - 1)  # beyond them the last again
    source = memory.activations + S.best + (column * S.best_column)[:, None] + (slot * 2)[None, :]
    scores, rows = gl.load(source, cache_modifier=".cg"), gl.load(source + 1, cache_modifier=".cg")
    best = gl.max(scores, axis=1)
    return best, gl.min(gl.where(scores == best[:, None], rows.to(gl.int32), NO_ROW), axis=1)


@gluon.jit
def cuts(own):
    """Whether top_k or top_p may leave rows out, of requests whose words lie there."""
    drawn = gl.load(own + INVERSE_TEMPERATURE).to(gl.float32, bitcast=True) > 0.0
    return drawn & ((gl.load(own + TOP_K) > 0) | (gl.load(own + TOP_P).to(gl.float32, bitcast=True) < 1.0))


@gluon.jit
def drawn_rows(S: gl.constexpr, memory, column, best, chosen):
    """`chosen`, but for columns whose request cuts: those are drawn, of one sequence as many as are kept."""
    number, going = 0, 1
    while (number < S.columns) & (going != 0):
        sequence = number // S.depth
        place = number - sequence * S.depth
        at, own = progress(memory, sequence), request(S, memory, sequence)
        position = gl.load(at + POSITION, cache_modifier=".cg") + place
        used = (place < gl.load(at + USED, cache_modifier=".cg")) & (runs(S, memory, sequence) != 0)
        numbers = gl.max(gl.where(column == number, best, float("-inf")), axis=0) < float("inf")
        if S.depth > 1:
            going = used.to(gl.int32)
        if used & cuts(own) & numbers:
            inverse, seed_low, seed_high = load_sampling(own)
            logits = memory.activations + S.logits + number * S.logits_column
            token = draw(S, logits, own, position, inverse, seed_low, seed_high)
            chosen = gl.where(column == number, token, chosen)
            if S.depth > 1:
                following = gl.load(tokens_of(S, memory, sequence) + position + 1, cache_modifier=".cg")
                prompt = position + 1 < gl.load(own + PROMPT_LENGTH)
                going = ((following == token) | prompt).to(gl.int32)
        number += 1
    return chosen


@gluon.jit
def is_stop(own, chosen):
    """Which of the chosen tokens are stop tokens of their requests, int32 [columns]."""
    count = gl.load(own + STOP_TOKENS)
    found = chosen * 0
    for j in range(gl.max(count, axis=0)):
        stop = gl.load(own + STOP_TOKENS + 1 + j, mask=j < count, other=-1)
        found |= (stop == chosen).to(gl.int32)
    return found


@gluon.jit
def advance(S: gl.constexpr, memory, step, slots):
    """Choose from `slots` slots of "best", store what is chosen, advance the sequences, draft.

    Where the sequences stand, the step before has left: it is loaded before the wait for this one.
    """
    column = gl.arange(0, MMA_COLUMNS, gl.SliceLayout(1, best_layout()))
    sequence = sequence_of(S, column)
    place = column - sequence * S.depth
    at, own, tokens = progress(memory, sequence), request(S, memory, sequence), tokens_of(S, memory, sequence)
    following = gl.load(at + POSITION, cache_modifier=".cg") + place + 1
    used = gl.load(at + USED, cache_modifier=".cg")
    going = (column < S.columns) & (runs(S, memory, sequence) != 0)
    prompt = following < gl.load(own + PROMPT_LENGTH)  # the prompt's own token stands
    cutting = gl.max(cuts(own).to(gl.int32), axis=0)
    steps = gl.load(at + STEPS, cache_modifier=".cg") + 1
    draft = gl.load(tokens + following, mask=place + 1 < used, other=-1, cache_modifier=".cg")
    wait_all(S, memory, step)
    best, chosen = best_rows(S, memory, slots)
    if cutting != 0:
        chosen = drawn_rows(S, memory, column, best, chosen)
    numberless = best == float("inf")
    stops = numberless | ((is_stop(own, chosen) != 0) & (prompt == 0))
    final = stops | (place + 1 >= used) | ((prompt == 0) & (draft != chosen))
    if S.depth == 1:
        last = place * 0
    else:
        last = gl.min(gl.where(final, place, MMA_COLUMNS), axis=0) + place * 0
    barrier()  # all have read where the step began
    gl.store(tokens + following, chosen, mask=going & (place <= last) & (prompt == 0) & (numberless == 0))
    here = going & (place == last)
    gl.store(own + STOP, following, mask=here & stops)
    gl.store(own + NO_NUMBERS, sequence * 0 + 1, mask=here & numberless)
    gl.store(at + POSITION, following, mask=here)
    gl.store(at + LAST, column, mask=here)
    gl.store(at + STEPS, steps, mask=column == 0)
    if S.depth > 1:
        barrier()
        draft_tokens(S, memory)


@gluon.jit
def usable(S: gl.constexpr, memory, position, end):
    """How many columns may hold tokens, the first at `position`: `Dimensions.usable`."""
    pages = (position + S.page_positions - 1) // S.page_positions
    slices = memory.bucket.slices
    alike = (pages + slices - 1) // slices * slices * S.page_positions
    return gl.maximum(gl.minimum(gl.minimum(alike - position + 1, end - position), S.depth), 1)


@gluon.jit
def draft_tokens(S: gl.constexpr, memory):
    """Note what may follow the one sequence's last token behind it, and how many columns of the next step that makes.

    What is left of a prompt stands there already.
    """
    at = progress(memory, 0)
    position = gl.load(at + POSITION, cache_modifier=".cg")
    known = gl.load(memory.control + PROMPT_LENGTH) - position
    most = usable(S, memory, position, gl.load(at + END, cache_modifier=".cg"))
    used = gl.minimum(most, gl.maximum(known, 1))
    if (most > 1) & (known <= 1):
        number = gl.arange(0, MMA_COLUMNS, draft_layout())
        wanted = number < most - 1
        if gl.load(at + SOURCE, cache_modifier=".cg") == GIVEN:
            given = memory.tokens + S.sequences * token_stride(S, memory) + position + 1
            drafts = gl.load(given + number, mask=wanted, other=-1, cache_modifier=".cg")
            used = 1 + gl.min(gl.where(drafts < 0, number, MMA_COLUMNS), axis=0)
            gl.store(memory.tokens + position + 1 + number, drafts, mask=wanted & (drafts >= 0))
        else:
            found = look_up(memory.tokens, position)
            if found >= 0:
                gl.store(memory.tokens + position + 1 + number, continued(memory.tokens, found, position), mask=wanted)
                used = most
    gl.store(at + USED, used)
