"""The order of prefill's kernels: each begins while the one before ends (programmatic dependent launch).

A kernel of the chain says at once that the next may start, which then waits, all set up, for SMs to become free and for this
one to end with all that it has written.  Every block of every kernel waits, so the end of one means the end of all before it.
Products of widened weights say so only once they have waited (`megakernel.device.prefill.widening`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def let_next_start():
    """The next kernel's blocks may take SMs that are free."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_previous():
    """Wait until the kernel before has ended; what it wrote is visible from here on."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)
