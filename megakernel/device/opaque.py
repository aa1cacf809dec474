"""Numbers that the compiler does not know.

A device function is part of one loop over all records.  What it makes of constants alone, the compiler would make once before
that loop, and keep it in registers through all other records' work.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def nothing():
    """0, of which the compiler does not know that it is: what it is added to is made here and now."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
