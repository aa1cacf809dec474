"""Counters in global memory: bounded waits, signals, and the report of a wait that expired.

A wait that expires does not stop its thread block on the spot, because some threads may have seen the counter in time and
others not: it falls through, and the block computes with whatever is there until the token's end, where all blocks leave
together.  Nothing reaches the user: the host raises.  Addresses never depend on such values, but for the token id, which
`embed` clamps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from instructions.codec import NONE
from megakernel.device.clocks import cycles
from megakernel.device.compat import barrier
from megakernel.device.context import FAULT, REPORT_WORDS, REPORTS
from megakernel.device.trace import READY, stamp
from megakernel.geometry import COUNTER_STRIDE
from megakernel.words import HINT_BIT, LAG_BIT, WAIT_BIT

STRIDE = gl.constexpr(COUNTER_STRIDE)
WAITED, LAGGING, HINT = gl.constexpr(WAIT_BIT), gl.constexpr(LAG_BIT), gl.constexpr(HINT_BIT)
ALL = gl.constexpr(2**30)  # signals: more than any counter gets
LONG_WAIT = gl.constexpr(200_000)  # clock cycles, about 0.1 ms: from here on a wait also looks for other blocks' faults


@gluon.constexpr_function
def report_asm(counter, wanted, seen, position):
    """Assembly that notes, once, what a place is stuck in; numbers or operands for what differs."""
    at = REPORTS.value * 4
    return f"""{{
    .reg .pred first;
    .reg .b32 old;
    .reg .b64 at;
    mad.wide.s32 at, $2, {REPORT_WORDS.value * 4}, $1;
    atom.relaxed.gpu.global.cas.b32 old, [at + {at}], 0, 1;
    setp.eq.s32 first, old, 0;
    @first st.relaxed.gpu.global.s32 [at + {at + 4}], $3;
    @first st.relaxed.gpu.global.s32 [at + {at + 8}], {counter};
    @first st.relaxed.gpu.global.s32 [at + {at + 12}], {wanted};
    @first st.relaxed.gpu.global.s32 [at + {at + 16}], {seen};
    @first st.relaxed.gpu.global.s32 [at + {at + 20}], {position};
    st.relaxed.gpu.global.s32 [$1 + {FAULT.value * 4}], 1;
    mov.b32 $0, old;
}}"""


REPORT_COUNTER = gl.constexpr(report_asm("$4", "$5", "$6", "$7"))
REPORT_VALUE = gl.constexpr(report_asm(NONE, 0, 0, "$4"))

# Barrier number 15 of the block is nobody else's; 128 are the consumer's threads.
AGREE = gl.constexpr("""{
    .reg .pred mine, any;
    setp.ne.b32 mine, $1, 0;
    barrier.cta.red.or.pred any, 15, 128, mine;
    selp.b32 $0, 1, 0, any;
}""")

AGREE_IN_WARP = gl.constexpr("""{
    .reg .pred mine, any;
    setp.ne.b32 mine, $1, 0;
    vote.sync.any.pred any, mine, 0xffffffff;
    selp.b32 $0, 1, 0, any;
}""")


@gluon.jit
def load_acquire(pointer):
    """A load that orders everything after it behind the release it reads from, at GPU scope."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def proxy_fence():
    """Order this thread's ordinary accesses to global memory and the TMA's (the asynchronous proxy) with each other."""
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def report(memory, place, record, counter, wanted, seen, position):
    """Note the counter that this role of this SM is stuck at, the first time, and tell the others to give up; the host finds
    out where it began."""
    gl.inline_asm_elementwise(
        REPORT_COUNTER,
        "=r,l,r,r,r,r,r,r",
        [memory.control, place, record, counter, wanted, seen, position],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def report_value(memory, place, record, position):
    """The same where a value never came."""
    gl.inline_asm_elementwise(
        REPORT_VALUE, "=r,l,r,r,r", [memory.control, place, record, position], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def given_up(memory, waited):
    """Whether to give up a wait of so many cycles: patience is at its end, or somebody else's was."""
    return (waited > memory.patience) | (load_acquire(memory.control + FAULT) != 0)


@gluon.jit
def wait_counter(memory, counter, wanted, place, record, position):
    """Spin until a counter has reached `wanted`, for at most `patience` cycles; `place` is that of this role's report."""
    pointer = memory.counters + counter * STRIDE
    seen = load_acquire(pointer)
    if seen < wanted:
        begin = cycles()
        waiting = 1
        while waiting == 1:
            seen = load_acquire(pointer)
            if seen >= wanted:
                waiting = 0
            else:
                waited = cycles() - begin
                if waited > LONG_WAIT:
                    if given_up(memory, waited):
                        report(memory, place, record, counter, wanted, seen, position)
                        waiting = 0


@gluon.jit
def wait_one(S: gl.constexpr, memory, step, number: gl.constexpr, counter, target, EARLY: gl.constexpr):
    """Wait number `number` of a record, if it has so many; the end of the token before has been waited for already."""
    waits = step.record.waits >> number
    waited, lag, hint = (waits >> WAITED) & 1, (waits >> LAGGING) & 1, (waits >> HINT) & 1
    if (waited != 0) & (counter != memory.bucket.end_counter) & ((hint == 0) | (EARLY != ALL)):
        wanted = target * (step.epoch + 1 - lag)
        if EARLY > 0:
            wanted -= hint * gl.minimum(target, EARLY)
        wait_counter(memory, counter, wanted, step.sm, step.index, step.position)


@gluon.jit
def wait_all(S: gl.constexpr, memory, step, EARLY: gl.constexpr = 0):
    """Wait for everything that the step's record waits for; also a barrier.

    An instruction calls this itself, after it has issued the loads that depend on nobody.  One that looks for its values until
    all of them are there can begin to look before the last `EARLY` signals: it waits for no more of those that are hints.
    """
    record = step.record
    wait_one(S, memory, step, 0, record.wait0, record.target0, EARLY)
    wait_one(S, memory, step, 1, record.wait1, record.target1, EARLY)
    barrier()
    stamp(S, step.trace, READY)


@gluon.jit
def signal(memory, counter, sem: gl.constexpr):
    """Add one to a counter, after a barrier has put every thread's stores before it."""
    if counter >= 0:
        gl.atomic_add(memory.counters + counter * STRIDE, 1, sem=sem, scope="gpu")


@gluon.jit
def signal_all(memory, record):
    """Tell this record's readers that its rows are on their way, or, releasing, that all of this SM's rows are visible."""
    barrier()
    if record.release == 0:
        signal(memory, record.signal0, "relaxed")
        signal(memory, record.signal1, "relaxed")
    else:
        signal(memory, record.signal0, "release")
        signal(memory, record.signal1, "release")


@gluon.jit
def agree(value):
    """1 if any of the consumer's threads comes with a number other than 0, the same for all of them; also a barrier.

    A scalar loaded by each thread may differ between threads when another SM writes it meanwhile, but branches around
    barriers must not.
    """
    return gl.inline_asm_elementwise(AGREE, "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def agree_in_warp(value):
    """1 if any of the warp's threads comes with a number other than 0, the same for all of them."""
    return gl.inline_asm_elementwise(AGREE_IN_WARP, "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)
