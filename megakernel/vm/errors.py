"""What the virtual machine raises when a program does what no valid program does."""

from __future__ import annotations

from models.errors import MachineError


class Fault(Exception):
    """A forbidden access, found where the instruction is not known; the actor that runs it turns it into a `VmError`."""


class VmError(MachineError):
    """A program broke the machine's rules.

    `sm` and `index` say whose instruction it was (index within the SM's queue), `instruction` is its disassembly; the
    message holds all three and what went wrong.
    """

    def __init__(self, sm: int, index: int, instruction: str, problem: str) -> None:
        super().__init__(f"sm {sm} #{index} [{instruction}]: {problem}")
        self.sm, self.index, self.instruction, self.problem = sm, index, instruction, problem
