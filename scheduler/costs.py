"""The stated cost model: what the simulator and the critical-path policy believe about the machine.

Figures are for an H100 SXM and come from docs/design.md (measured with a prototype of the projections); they are a model,
not a measurement of a program.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Instruction
from instructions.shape import Shape


@dataclass(frozen=True)
class MachineModel:
    """Times in seconds, sizes in bytes."""

    bandwidth: float = 2.95e12  # HBM bytes a second, all SMs together
    sm_bandwidth: float = 60e9  # most that one SM's copies can draw
    copies: int = 3  # copies in flight per SM
    latency: float = 0.9e-6  # from issuing a copy to its landing on an idle memory system
    drain: float = 0.12e-6  # consuming one landed page
    hop: float = 1.9e-6  # from the last store of a producer to its reader's start: release, poll, activation load
    overhead: float = 0.25e-6  # fetching and decoding an instruction


def duration(instruction: Instruction, shape: Shape, past: int, sms: int, model: MachineModel) -> float:
    """Seconds an instruction keeps its SM busy when all SMs stream at once."""
    return model.overhead + instruction.cost(shape, past).bytes * sms / model.bandwidth
