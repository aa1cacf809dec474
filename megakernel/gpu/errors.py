"""What can go wrong on a GPU: a device that cannot run the kernel, a compiler or a driver that fails, and a wait that expired
inside the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triton.errors import TritonError

from models.errors import MachineError, UserError


class GpuError(UserError):
    """The GPU cannot be used as asked; the message names the mend."""


class KernelFault(MachineError):
    """Some wait in the kernel expired; the message holds the instruction that was stuck, the counter, wanted and seen."""


@contextmanager
def one_line(doing: str) -> Iterator[None]:
    """What CUDA, PyTorch or Triton raise within it becomes a `MachineError` of one line: what was being done, and the first
    line of theirs that says anything."""
    try:
        yield
    except MachineError:
        raise
    except (RuntimeError, OSError, TritonError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "nothing was said of it")
        raise MachineError(f"{doing} failed: {type(error).__name__}: {said}; free GPU memory or try again") from error
