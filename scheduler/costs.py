"""The stated cost model: what the simulator and the critical-path policy believe about the machine.

The figures come from time stamps inside the kernel on an H100 and were then fitted, within what those allow, to measured step
times of Llama-3.2-1B; docs/scheduler.md compares.  They are a model, not a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from instructions.base import Instruction, Region
from instructions.sample import Sample
from instructions.shape import Shape


@dataclass(frozen=True)
class MachineModel:
    """Times in seconds, bandwidths in bytes a second."""

    name: str = "h100"
    bandwidth: float = 3.12e12  # HBM, all SMs together: the read floor of bench.decode
    sm_bandwidth: float = 60e9  # most that one SM's copies can draw
    copies: int = 2  # copies in flight per SM, as where the kernel's loader is ahead
    latency: float = 0.7e-6  # from issuing a copy to its landing on an idle memory system
    drain: float = 0.25e-6  # consuming one landed page
    overhead: float = 0.05e-6  # turning to the next instruction, whose record has been fetched
    poll: float = 0.4e-6  # from the last signal of a counter to the end of a wait for it
    activation_latency: float = 0.4e-6  # first activation value from L2
    activation_bandwidth: float = 40e9  # the rest of them, per SM
    signal: float = 0.15e-6  # storing rows and signalling; the SM's consumer does nothing else meanwhile
    release: float = 1.4e-6  # the same with the fence that makes all its stores visible, on average
    straggle: float = 0.2e-6  # the last of n signals comes straggle * ln(n) later than n average ones would

    def ending(self, release: bool) -> float:
        """Seconds from an instruction's last page to its signals."""
        return self.release if release else self.signal

    def hop(self, producers: int) -> float:
        """Seconds from the last of `producers` signals, each of average duration, to the end of a wait for all of them."""
        return self.poll + self.straggle * math.log(producers)


MACHINES = {
    "h100": MachineModel(),
    "h200": replace(MachineModel(), name="h200", bandwidth=4.53e12),
}


def region_bytes(region: Region, shape: Shape) -> int:
    """Bytes of a region: fp32, but for the rows of the KV cache."""
    return (region.stop - region.start) * (shape.itemsize if region.buffer == "kv" else 4)


def activation_bytes(instruction: Instruction, shape: Shape) -> int:
    """Bytes that the consumer reads from L2 before it starts; of a `Sample` what a greedy one reads."""
    regions = instruction.reads(shape)
    if isinstance(instruction, Sample):
        regions = tuple(region for region in regions if region.buffer == "best")
    return sum(region_bytes(region, shape) for region in regions)


def preparation(instruction: Instruction, shape: Shape, model: MachineModel) -> float:
    """Seconds from the end of the waits to the first page: reading activations, and what is streamed past the ring."""
    seconds = model.activation_latency + activation_bytes(instruction, shape) / model.activation_bandwidth
    if not instruction.page_uses(shape) and (gathered := instruction.cost(shape, 0).bytes):
        seconds += model.latency + gathered / model.sm_bandwidth
    return seconds


def duration(instruction: Instruction, shape: Shape, past: int, sms: int, model: MachineModel) -> float:
    """Seconds an instruction keeps its SM busy when all SMs stream at once, its waits aside, and a fence at its end."""
    streaming = instruction.cost(shape, past).bytes * sms / model.bandwidth if instruction.page_uses(shape) else 0.0
    return model.overhead + preparation(instruction, shape, model) + streaming + model.signal
