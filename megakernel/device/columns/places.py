"""Where the columns of a step stand: their positions, their requests, their rows.

With one column these are what they would be without columns: the kernel is the same, instruction for instruction.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megakernel.device.context import END, POSITION, REQUEST, SEQUENCE_WORDS, SEQUENCES, SLICES, STOP, USED
from megakernel.device.formats.layouts import MMA_COLUMNS
from megakernel.device.matvec import PAGE_ELEMENTS
from megakernel.device.sync import load_acquire
from megakernel.geometry import TOKEN_SLACK

SLACK = gl.constexpr(TOKEN_SLACK)


@gluon.constexpr_function
def columns_layout():
    """A number for each column, all of them in every thread."""
    return gl.BlockedLayout([MMA_COLUMNS.value], [32], [4], [0])


@gluon.jit
def kept(S: gl.constexpr, column):
    """Which columns of the matrix instruction hold a token of their own; with one column all of them hold it."""
    if S.columns == 1:
        inside = column == 0
    else:
        inside = column < S.columns
    return inside


@gluon.jit
def in_column(S: gl.constexpr, place, column, distance: gl.constexpr):
    """The same place in a column, whose rows lie `distance` behind those of the column before."""
    if S.columns > 1:
        place += column * distance
    return place


@gluon.jit
def sequence_of(S: gl.constexpr, column):
    """The sequence of a column; of one beyond them the last."""
    return gl.minimum(column, S.columns - 1) // S.depth


@gluon.jit
def progress(memory, sequence):
    """Where a sequence's progress stands, `megakernel.control_block.Progress`."""
    return memory.control + SEQUENCES + sequence * SEQUENCE_WORDS


@gluon.jit
def request(S: gl.constexpr, memory, sequence):
    """Where a sequence's request stands, `megakernel.control_block.Control`."""
    if S.sequences == 1:
        place = memory.control + sequence * 0
    else:
        place = memory.control + gl.where(sequence == 0, 0, SEQUENCES + sequence * SEQUENCE_WORDS + REQUEST)
    return place


@gluon.jit
def tokens_of(S: gl.constexpr, memory, sequence):
    """A sequence's tokens, by position; those that are given as drafts lie behind the tokens of all sequences."""
    return memory.tokens + sequence * token_stride(S, memory)


@gluon.jit
def token_stride(S: gl.constexpr, memory):
    """From the tokens of one sequence to those of the next: `megakernel.geometry.token_stride`."""
    return memory.bucket.head_pages * S.page_positions + SLACK


@gluon.jit
def first_position(S: gl.constexpr, memory, sequence):
    """The position of a sequence's first column.  One of several that has reached its end repeats its last position, which the
    program can decode, while others go on; one that takes no part computes position 0 for nobody."""
    at = progress(memory, sequence)
    first = gl.load(at + POSITION, cache_modifier=".cg")
    if S.sequences > 1:
        first = gl.maximum(gl.minimum(first, gl.load(at + END, cache_modifier=".cg") - 1), 0)
    return first


@gluon.jit
def position_of(S: gl.constexpr, memory, step, column):
    """The position of a column's token.  Columns that have none of their own repeat the sequence's last."""
    if S.columns == 1:
        position = step.position
    else:
        sequence = sequence_of(S, column)
        used = gl.load(progress(memory, sequence) + USED, cache_modifier=".cg")
        position = first_position(S, memory, sequence) + gl.minimum(
            gl.minimum(column, S.columns - 1) - sequence * S.depth, used - 1
        )
    return position


@gluon.jit
def slices_of(S: gl.constexpr, memory, sequence):
    """How many slices a sequence's context is split into.  Those of the program beyond them stay empty: so a sequence's sums do
    not depend on how long the others are."""
    slices = memory.bucket.slices
    if S.sequences > 1:
        slices = gl.load(progress(memory, sequence) + SLICES, cache_modifier=".cg")
    return slices


@gluon.jit
def sequence_rows(S: gl.constexpr, memory, cache, column):
    """The KV cache of a column's sequence, of which `cache` is a place in the first one's."""
    if S.sequences > 1:
        pages = memory.bucket.head_pages * (S.layers * S.kv_heads * 2)
        cache += (sequence_of(S, column) * pages).to(gl.int64) * PAGE_ELEMENTS
    return cache


@gluon.jit
def caches(S: gl.constexpr, memory, column, inside):
    """`inside`, but for columns of a sequence that takes no part in the launch, whose END is 0: its cache stays as it is."""
    if S.sequences > 1:
        end = gl.load(progress(memory, sequence_of(S, column)) + END, cache_modifier=".cg")
        inside = inside & (end > 0)
    return inside


@gluon.jit
def over(S: gl.constexpr, memory, here):
    """Whether nothing is left to decode: with one column at position `here`, else in any sequence.

    Whoever asks has seen the end of the step before, so the words of several columns stand.
    """
    if S.columns == 1:
        ended = load_acquire(memory.control + STOP) <= here
    else:
        every = gl.arange(0, MMA_COLUMNS, columns_layout())
        ended = gl.max(runs(S, memory, sequence_of(S, every)), axis=0) == 0
    return ended


@gluon.jit
def runs(S: gl.constexpr, memory, sequence):
    """Whether a sequence has a position left to decode, int32."""
    at = progress(memory, sequence)
    position = gl.load(at + POSITION, cache_modifier=".cg")
    stop = gl.load(request(S, memory, sequence) + STOP, cache_modifier=".cg")
    return (position < gl.minimum(stop, gl.load(at + END, cache_modifier=".cg"))).to(gl.int32)
