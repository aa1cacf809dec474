"""Values that announce themselves: stores without a fence, and loads that are repeated until every value is there.

An activation has two places, one for even and one for odd epochs.  Whoever stores this token's value also marks the other
place VACANT, for the next token; whoever loads takes nothing for a value that is VACANT, and looks again.  So a signal need
not wait until the stores before it can be seen: it only says when looking is worth while.  docs/proof.md shows why a reader
never takes an older or a younger value.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.shape import VACANT as VACANT_BITS
from megakernel.device.clocks import cycles
from megakernel.device.sums import any_of_vector
from megakernel.device.sync import LONG_WAIT, agree, agree_in_warp, given_up, report_value

VACANT = gl.constexpr(VACANT_BITS)

STORE = gl.constexpr(f"""{{
    .reg .pred inside;
    setp.ne.b32 inside, $4, 0;
    @inside st.relaxed.gpu.global.b32 [$1], $3;
    @inside st.relaxed.gpu.global.b32 [$2], {VACANT_BITS};
    mov.b32 $0, 0;
}}""")
# Four values of a thread that lie side by side, 16 bytes at a time; the mask is the first one's.
STORE_FOUR = gl.constexpr(f"""{{
    .reg .pred inside;
    .reg .b32 vacant;
    setp.ne.b32 inside, $16, 0;
    mov.b32 vacant, {VACANT_BITS};
    @inside st.relaxed.gpu.global.v4.b32 [$4], {{$12, $13, $14, $15}};
    @inside st.relaxed.gpu.global.v4.b32 [$8], {{vacant, vacant, vacant, vacant}};
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
}}""")
# Of four values of a thread, one comparison each: each is joined to what those before it have found.
ANY_ABSENT = gl.constexpr(f"""{{
    .reg .pred any;
    setp.eq.s32 any, $4, {VACANT_BITS};
    setp.eq.or.s32 any, $5, {VACANT_BITS}, any;
    setp.eq.or.s32 any, $6, {VACANT_BITS}, any;
    setp.eq.or.s32 any, $7, {VACANT_BITS}, any;
    selp.b32 $0, 1, 0, any;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
}}""")
# A register of PTX that Triton does not know of: whether this thread misses anything.  What a tensor's threads have found need
# not become a tensor's maximum, with its shuffles and two trips through shared memory: the hardware's barrier joins it.
DECLARE = gl.constexpr(".reg .b32 missing_here; mov.b32 missing_here, 0; mov.b32 $0, 0;")
MISSING = gl.constexpr("""{
    .reg .pred any;
    setp.ne.b32 any, $1, 0;
    @any mov.b32 missing_here, 1;
    mov.b32 $0, 0;
}""")
ANYWHERE = gl.constexpr("""{
    .reg .pred mine, any;
    setp.ne.b32 mine, missing_here, 0;
    mov.b32 missing_here, 0;
    barrier.cta.red.or.pred any, 15, 128, mine;
    selp.b32 $0, 1, 0, any;
}""")
FIRST_WARP = gl.constexpr("{ .reg .b32 thread; mov.u32 thread, %tid.x; set.lt.u32.u32 $0, thread, 32; }")


@gluon.jit
def declare_missing():
    """Once, before everything else: the register behind `any_missing`."""
    gl.inline_asm_elementwise(DECLARE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def values_of(S: gl.constexpr, memory, step):
    """The activations of this token's copy."""
    return memory.activations + (step.epoch & 1) * S.second


@gluon.jit
def rows_of(S: gl.constexpr, memory, step, buffer: gl.constexpr, layer):
    """One layer of a buffer of activations, of this token's copy."""
    return values_of(S, memory, step) + buffer.first + layer * buffer.stride


@gluon.jit
def partials_of(S: gl.constexpr, memory, step):
    """What the slices of the record's layer leave for `Combine`, in this token's copy."""
    first = memory.activations + S.partial + step.record.layer * memory.bucket.partial_stride
    return first + (step.epoch & 1) * memory.bucket.partial_second


@gluon.jit
def put_apart(step, second, target, values, mask):
    """Store fp32 values at `target` in this token's copy, and vacate their places in the other; `second` elements lie between
    the first copy and the second."""
    other = target + gl.where((step.epoch & 1) == 0, second, -second)
    bits = values.to(gl.int32, bitcast=True)
    gl.inline_asm_elementwise(
        STORE, "=r,l,l,r,r", [target, other, bits, mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def put_fours(S: gl.constexpr, step, target, values, mask):
    """`put` for a tensor of which a thread holds four values side by side, from multiples of 16 bytes on, where the mask of the
    first is that of all."""
    other = target + gl.where((step.epoch & 1) == 0, S.second, -S.second)
    bits = values.to(gl.int32, bitcast=True)
    gl.inline_asm_elementwise(
        STORE_FOUR,
        "=r,=r,=r,=r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r",
        [target, other, bits, mask.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def put(S: gl.constexpr, step, target, values, mask):
    """`put_apart` for all buffers but the slices' own."""
    put_apart(step, S.second, target, values, mask)


@gluon.jit
def in_first_warp():
    """Whether this thread belongs to the first warp: what every warp holds whole, one stores."""
    return gl.inline_asm_elementwise(FIRST_WARP, "=r", [], dtype=gl.int32, is_pure=False, pack=1) != 0


@gluon.jit
def put_once(S: gl.constexpr, step, target, values, mask):
    """`put` for a tensor that every warp holds whole."""
    put(S, step, target, values, mask & in_first_warp())


@gluon.jit
def look(source, mask):
    """fp32 values, or vacant places, as they are now; zeros outside the mask."""
    return gl.load(source, mask=mask, other=0.0, volatile=True)


@gluon.jit
def vacant(values):
    """Which values are not there yet, int32: 1, the others 0."""
    return (values.to(gl.int32, bitcast=True) == VACANT).to(gl.int32)


@gluon.jit
def absent(values):
    """Whether any of four values of a thread is not there yet, int32: 1 in the place of the first, 0 in those of the others."""
    return gl.inline_asm_elementwise(
        ANY_ABSENT,
        "=r,=r,=r,=r,r,r,r,r",
        [values.to(gl.int32, bitcast=True)],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def impatient(memory, step, begin):
    """Whether to give up what has been looked for since `begin`, int32, for each thread by itself; notes who is stuck where
    patience is at its end."""
    give_up = 0
    waited = cycles() - begin
    if waited > LONG_WAIT:
        if given_up(memory, waited):
            report_value(memory, step.sm, step.index, step.position)
            give_up = 1
    return give_up


@gluon.jit
def patient(memory, step, begin):
    """Whether patience since `begin` is not at its end, int32, the same for all threads.  Also a barrier."""
    return 1 - agree(impatient(memory, step, begin))


@gluon.jit
def any_missing(missing):
    """Whether anything is missing, int32, the same for all threads.  Also a barrier.

    As `look_again` finds it, sooner and without patience; in a loop that has it the loads of the next look would wait for each
    other.
    """
    gl.inline_asm_elementwise(MISSING, "=r,r", [missing], dtype=gl.int32, is_pure=False, pack=1)
    return gl.inline_asm_elementwise(ANYWHERE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def look_again(memory, step, begin, missing):
    """Whether anything is missing, and patience since `begin` not at its end; int32, the same for all threads.  Also a barrier.

    `missing` is a tensor of 0 and 1 of which each warp holds its own part, so that its maximum is one that all threads share.
    """
    return while_patient(memory, step, begin, gl.reduce_or(gl.reshape(missing, [missing.numel]), axis=0))


@gluon.jit
def look_at_vector_again(memory, step, begin, missing):
    """`look_again` for what lies as `vector_layout` says: the warps meet once to find out what is missing."""
    return while_patient(memory, step, begin, any_of_vector(missing))


@gluon.jit
def while_patient(memory, step, begin, waiting):
    """`waiting`, the same for all threads, or 0 when patience since `begin` is at its end."""
    if waiting != 0:
        waiting = patient(memory, step, begin)
    return waiting


@gluon.jit
def complete(memory, step, values, source, mask):
    """What `look` saw at `source`, looked for again until nothing is vacant.

    For a tensor that every warp holds whole, one that `put_once` will store: each warp looks for itself, and two may see
    different things.
    """
    begin, waiting = cycles(), 1
    while waiting != 0:
        waiting = gl.max(gl.reshape(vacant(values), [values.numel]), axis=0)
        if waiting != 0:
            waiting = 1 - agree_in_warp(impatient(memory, step, begin))
            values = look(source, mask)
    return values
