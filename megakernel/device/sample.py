"""Device side of `instructions.sample`: choose the next token, append it, check it against the stop tokens."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.control_block import MOST_STOP_TOKENS
from megakernel.device.columns.advance import advance
from megakernel.device.context import NO_NUMBERS, PROMPT_LENGTH, STOP, STOP_TOKENS, TOP_K, TOP_P
from megakernel.device.draws import draw
from megakernel.device.numbers import power_of_two
from megakernel.device.sampling import best_of, load_sampling
from megakernel.device.sync import wait_all

STOPS = gl.constexpr(MOST_STOP_TOKENS)


@gluon.jit
def sample(S: gl.constexpr, memory, ring, step):
    """Of `slots` slots in "best", or of the rows that a cut keeps; the prompt's own tokens stand.  Logits that are no finite
    numbers end the request."""
    slots = step.record.a
    if S.columns == 1:
        sample_one(S, memory, step, slots)
    else:
        advance(S, memory, step, slots)


@gluon.jit
def sample_one(S: gl.constexpr, memory, step, slots):
    """`sample` of a single column.  What the request says is loaded before the wait."""
    inverse_temperature, seed_low, seed_high = load_sampling(memory.control)
    top_k = gl.load(memory.control + TOP_K)
    top_p = gl.load(memory.control + TOP_P).to(gl.float32, bitcast=True)
    slot = gl.arange(0, S.best_slots, gl.BlockedLayout([1], [32], [4], [0]))
    source = memory.activations + S.best + gl.minimum(slot, slots - 1) * 2  # beyond them the last again
    prompt_length, stops = gl.load(memory.control + PROMPT_LENGTH), gl.load(memory.control + STOP_TOKENS)
    number = gl.arange(0, power_of_two(STOPS), gl.BlockedLayout([1], [32], [4], [0]))
    listed = gl.load(memory.control + STOP_TOKENS + 1 + number, mask=number < STOPS, other=-1)
    wait_all(S, memory, step)
    scores, rows = gl.load(source, cache_modifier=".cg"), gl.load(source + 1, cache_modifier=".cg")
    best, token = best_of(scores, rows.to(gl.int32))
    if (inverse_temperature > 0.0) & (best < float("inf")):
        if (top_k > 0) | (top_p < 1.0):
            logits = memory.activations + S.logits
            token = draw(S, logits, memory.control, step.position, inverse_temperature, seed_low, seed_high)
    next_position = step.position + 1
    if best == float("inf"):
        gl.store(memory.control + NO_NUMBERS, 1)
        gl.store(memory.control + STOP, next_position)
    elif next_position >= prompt_length:
        gl.store(memory.tokens + next_position, token)
        if gl.max(((listed == token) & (number < stops)).to(gl.int32), axis=0) != 0:
            gl.store(memory.control + STOP, next_position)
