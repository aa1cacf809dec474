"""The CPU virtual machine, the executable specification of the kernel: see `megakernel.vm.vm`."""

from megakernel.vm.errors import VmError
from megakernel.vm.state import DecodeState
from megakernel.vm.vm import Vm

__all__ = ["DecodeState", "Vm", "VmError"]
