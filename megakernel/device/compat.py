"""All that differs between the Triton versions we support (3.6 and later): Gluon renamed what the kernel uses."""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate

__all__ = ["aggregate", "barrier", "copy_page", "reinterpret"]


def aggregate(cls: type) -> Any:
    """A Triton aggregate whose constructor takes the annotated fields, in their order.

    Triton's cache goes by the source of a constructor, and by the constants that it uses: so the names are one of them, or a
    kernel whose fields were renamed or exchanged would be taken for the one compiled before.
    """
    FIELDS = gl.constexpr(tuple(cls.__annotations__))

    @gluon.constexpr_function
    def __init__(self, *values):
        for name, value in zip(FIELDS.value, values, strict=True):
            setattr(self, name, value)

    cls.__init__ = __init__
    return _aggregate(cls)


VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

if VERSION >= (3, 7):
    barrier = gl.barrier
else:
    barrier = gl.thread_barrier

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """Shared memory seen as another type, shape and layout."""
        return memory.reinterpret(dtype, shape, layout)
else:

    @gluon.jit
    def reinterpret(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """Shared memory seen as another type, shape and layout."""
        return memory._reinterpret(dtype, shape, layout)


if hasattr(tma, "async_load"):
    copy_page = tma.async_load
else:
    copy_page = tma.async_copy_global_to_shared
