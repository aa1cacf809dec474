"""What can go wrong on a GPU: a device that cannot run the kernel, and a wait that expired inside the kernel."""

from __future__ import annotations

from models.errors import MachineError, UserError


class GpuError(UserError):
    """The GPU cannot be used as asked; the message names the mend."""


class KernelFault(MachineError):
    """Some wait in the kernel expired; the message holds the instruction that was stuck, the counter, wanted and seen."""
