"""Row blocks times the staged activation, on the tensor cores: the device side of `instructions.matvec`.

A page is the A operand of a batched mma, [tiles, 16 rows, columns]; the tiles are a batch dimension spread over the warps
and summed at the end of a row block.  The activation is the B operand, the same in all of its 8 columns.  What a page holds
is its matrix's format (`megakernel.device.formats`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megakernel.device.clocks import cycles
from megakernel.device.columns.operand import arrived, operand_of, pages_of, pages_together
from megakernel.device.columns.staging import activation_of, stage_norms
from megakernel.device.compat import barrier, reinterpret
from megakernel.device.formats.layouts import ROWS, staged
from megakernel.device.numbers import largest_divisor, power_of_two
from megakernel.device.pages import release
from megakernel.device.sums import result_layout, sum_of, sum_of_vector, width
from megakernel.device.sync import wait_all
from megakernel.device.trace import COMPUTED, LANDED, STAGED, stamp
from megakernel.device.values import absent, any_missing, look, look_again, look_at_vector_again, vacant
from megakernel.geometry import ITEM_BYTES
from models.tape import PAGE_BYTES, TILE_BYTES, TILES_PER_PAGE

LINES = gl.constexpr(PAGE_BYTES // TILE_BYTES)  # 128-byte lines of a page: rows of the TMA descriptor
PAGE_COLUMNS = gl.constexpr(TILES_PER_PAGE * TILE_BYTES // ITEM_BYTES)
PAGE_ELEMENTS = gl.constexpr(PAGE_BYTES // ITEM_BYTES)
EARLY = gl.constexpr(8)  # signals before the last when a norm's input is looked for: all of it must be there, and is long


@gluon.constexpr_function
def vector_layout():
    """Activation vectors: 16 bytes a thread, a warp's loads side by side."""
    return gl.BlockedLayout([4], [32], [4], [0])


@gluon.jit
def stage_norm(
    S: gl.constexpr,
    memory,
    ring,
    step,
    source,
    buffer: gl.constexpr,
    weight,
    matrix: gl.constexpr,
    SIGNALS: gl.constexpr = EARLY,
):
    """Wait for the step's input, then stage rms_norm(source) * weight for fp32 vectors as long as the matrix's rows, rounded to
    bf16 and padded with zeros.  `source` lies in a `buffer`.  The weights depend on nobody and are loaded before the wait, the
    input is looked for SIGNALS signals before the last."""
    SIZE: gl.constexpr = power_of_two(matrix.pages) * matrix.format.COLUMNS
    if S.columns == 1:
        stage_one(S, memory, ring, step, source, weight, matrix, SIZE, SIGNALS)
    else:
        stage_norms(S, memory, ring, step, source, buffer.column, weight, matrix, SIZE)


@gluon.jit
def stage_one(
    S: gl.constexpr, memory, ring, step, source, weight, matrix: gl.constexpr, SIZE: gl.constexpr, SIGNALS: gl.constexpr
):
    """`stage_norm` for a single column."""
    COUNT: gl.constexpr = matrix.columns
    index = gl.arange(0, SIZE, vector_layout())
    staging = reinterpret(ring.staging, gl.bfloat16, [1, SIZE], staged(matrix.format.STAGED, [SIZE])).index(0)
    w = gl.load(weight + index, mask=index < COUNT, other=0.0)
    wait_all(S, memory, step, SIGNALS)
    x = look(source + index, index < COUNT)
    squares = sum_of_vector(x * x)
    if squares != squares:  # not a number, as a vacant place is none
        begin, waiting = cycles(), 1
        while waiting != 0:
            waiting = look_again(memory, step, begin, vacant(x))
            if waiting != 0:
                x = look(source + index, index < COUNT)
        squares = sum_of_vector(x * x)
    scale = gl.rsqrt(squares / COUNT + S.epsilon)
    values = (x * scale * w).to(gl.bfloat16)
    staging.store(values)
    matrix.format.stage_sums(S, ring, 0, values)
    barrier()
    stamp(S, step.trace, STAGED)


@gluon.jit
def multiply_page(S: gl.constexpr, F: gl.constexpr, ring, step, use, page, acc):
    """Wait for page use `use`, of format F, release it, and add its product with page `page` of the staged activation."""
    slot = use % S.ring
    return multiply_by(S, F, ring, step, use, slot, activation_of(S, F, ring, page), acc)


@gluon.jit
def multiply_by(S: gl.constexpr, F: gl.constexpr, ring, step, use, slot, x, acc):
    """Wait for page use `use`, of format F, in its slot, release it, and add its product with `x`, the B operand."""
    mbarrier.wait(ring.full.index(slot), (use // S.ring) & 1)
    if S.trace:
        if use == step.use:
            stamp(S, step.trace, LANDED)
    taken = F.take(S, ring, slot)
    release(ring, slot)
    return F.product(taken, x, acc)


@gluon.jit
def multiply_pages(S: gl.constexpr, F: gl.constexpr, ring, step, use, first, PAGES: gl.constexpr):
    """The product of PAGES page uses from `use` on with the staged activation from page `first` on; returns the sums of its
    tiles, fp32 [tiles, 16 rows, 8 columns]."""
    GROUP: gl.constexpr = largest_divisor(PAGES, F.TOGETHER)
    acc = F.nothing()
    for group in range(PAGES // GROUP):
        for j in gl.static_range(GROUP):
            page = group * GROUP + j
            acc = multiply_page(S, F, ring, step, use + page, first + page, acc)
    return F.total(acc)


@gluon.jit
def row_block(S: gl.constexpr, ring, step, use, matrix: gl.constexpr):
    """Multiply the next row block of a matrix by the staged activation; returns what
    `megakernel.device.sums.sum_of` does."""
    tiles = multiply_pages(S, matrix.format, ring, step, use, 0, matrix.pages)
    stamp(S, step.trace, COMPUTED)
    return sum_of(S, tiles)


@gluon.jit
def stage_and_multiply(S: gl.constexpr, memory, ring, step, source, matrix: gl.constexpr):
    """Round an fp32 vector as long as the matrix's rows to bf16 and stage it, padded with zeros to whole pages, as soon as it
    is there, and multiply the step's first row block by it; returns what `row_block` does.

    A part of the vector is on its way from L2 while the part before it is multiplied.
    """
    F: gl.constexpr = matrix.format
    PAGES: gl.constexpr = matrix.pages
    GROUP: gl.constexpr = largest_divisor(PAGES, F.TOGETHER)
    STAGED_PAGES: gl.constexpr = matrix.staged
    PARTS: gl.constexpr = (PAGES + STAGED_PAGES - 1) // STAGED_PAGES
    COUNT: gl.constexpr = matrix.columns
    SIZE: gl.constexpr = STAGED_PAGES * F.COLUMNS
    column = gl.arange(0, SIZE, vector_layout())
    staging = reinterpret(ring.staging, gl.bfloat16, [PARTS, SIZE], staged(F.STAGED, [SIZE]))
    acc = F.nothing()
    values = look(source + column, column < COUNT)
    begin = cycles()
    for part in range(PARTS):
        waiting = any_missing(absent(values))
        while waiting != 0:
            values = look(source + column, column < COUNT)
            waiting = look_at_vector_again(memory, step, begin, absent(values))
        rounded = values.to(gl.bfloat16)
        staging.index(part).store(rounded)
        F.stage_sums(S, ring, part, rounded)
        barrier()
        if S.trace:
            if part == 0:
                stamp(S, step.trace, STAGED)
        if PARTS > 1:
            column += SIZE
            values = look(source + column, column < COUNT)
        if STAGED_PAGES == GROUP:
            for j in gl.static_range(GROUP):
                page = part * GROUP + j
                acc = multiply_page(S, F, ring, step, step.use + page, page, acc)
        else:
            first = part * (STAGED_PAGES // GROUP)
            for group in range(first, gl.minimum(first + STAGED_PAGES // GROUP, PAGES // GROUP)):
                for j in gl.static_range(GROUP):
                    page = group * GROUP + j
                    acc = multiply_page(S, F, ring, step, step.use + page, page, acc)
    stamp(S, step.trace, COMPUTED)
    return sum_of(S, F.total(acc))


@gluon.jit
def multiply_columns(S: gl.constexpr, memory, ring, step, use, source, distance: gl.constexpr, matrix: gl.constexpr):
    """Multiply the row block whose pages begin at `use` by vectors as long as the matrix's rows, `distance` from one column to
    the next, whose words lie as `megakernel.device.columns.operand` says, as soon as they are there; returns what
    `row_block` does.

    Nothing is staged: every word is loaded by the thread that the tensor cores take it from.  The words of the next pages are
    asked for early, but not waited for any later: more of them on their way made it slower (docs/notebook/columns.md).
    """
    F: gl.constexpr = matrix.format
    GROUP: gl.constexpr = pages_together(matrix.pages, S.columns, S.down.columns, F.TOGETHER)
    acc = F.nothing()
    begin = cycles()
    words = pages_of(S, source, 0, GROUP, distance, matrix)
    for group in range(matrix.pages // GROUP):
        page = group * GROUP
        after = pages_of(S, source, page + GROUP, GROUP, distance, matrix)
        words = arrived(S, memory, step, begin, words, source, page, GROUP, distance, matrix)
        for j in gl.static_range(GROUP):
            here = use + page + j
            acc = multiply_by(S, F, ring, step, here, here % S.ring, F.with_words(operand_of(F, words[j])), acc)
        words = after
    stamp(S, step.trace, COMPUTED)
    return sum_of(S, F.total(acc))


@gluon.jit
def layer_constants(memory, places: gl.constexpr, layer):
    """Where one layer's norm weights or biases begin."""
    return memory.constants + places.first + layer * places.stride


@gluon.jit
def block_index(S: gl.constexpr):
    """16 * row + column of every element of a row block's result, int32 [16 rows, `width`]."""
    RESULT: gl.constexpr = result_layout(S.columns)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, RESULT))
    columns = gl.arange(0, width(S.columns), gl.SliceLayout(0, RESULT))
    return rows[:, None] * 16 + columns[None, :]


@gluon.jit
def halves(block):
    """Rows 0 to 7 and rows 8 to 15 of a row block, element for element beside each other: two [8 rows, columns]."""
    return gl.split(gl.permute(gl.reshape(block, [2, ROWS // 2, block.shape[1]]), [1, 2, 0]))
