"""The read floor: how fast this GPU can read the very bytes that a decode step reads, by the fastest of several ways.

A step cannot be faster.  `torch.sum` is the way that anybody can repeat; a plain persistent kernel, in a few shapes, shows
that it is not the slowness of that sum which flatters the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import triton
import triton.language as tl

from models.tape import PAGE_BYTES

WARM_UPS = 3
RUNS = 5
CALLS = 10  # back to back in a run, so that a launch's own time vanishes
SHAPES = ((4096, 8, 4), (4096, 4, 8), (2048, 4, 8), (4096, 16, 2), (4096, 8, 2))  # int32 values at a time, warps, blocks an SM


@dataclass(frozen=True)
class Floor:
    """Milliseconds that each way takes to read `bytes`."""

    bytes: int
    milliseconds: dict[str, float]

    @property
    def way(self) -> str:
        """The fastest."""
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])

    @property
    def best(self) -> float:
        """Its milliseconds."""
        return self.milliseconds[self.way]


@triton.jit(do_not_specialize=["first_blocks", "second_blocks"])
def read_all(first, first_blocks, second, second_blocks, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up int32 values of two buffers, of so many blocks of BLOCK each; block i is read by program i modulo the programs."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.range(program, first_blocks, programs, loop_unroll_factor=2):
        total += tl.load(first + i.to(tl.int64) * BLOCK + lanes)
    for i in tl.range(program, second_blocks, programs, loop_unroll_factor=2):
        total += tl.load(second + i.to(tl.int64) * BLOCK + lanes)
    tl.store(out + program, tl.sum(total, axis=0))


def measure_floor(weights: torch.Tensor, cache: torch.Tensor) -> Floor:
    """Read whole pages of weights and of the KV cache, both on the GPU."""
    words = [pages.view(-1).view(torch.int32) for pages in (weights, cache)]
    numbers = [pages.view(-1).view(torch.float32) for pages in (weights, cache) if pages.numel()]
    sms = torch.cuda.get_device_properties(weights.device).multi_processor_count
    ways: dict[str, Callable[[], object]] = {"torch.sum": lambda: [part.sum() for part in numbers]}
    for block, warps, blocks_per_sm in SHAPES:
        name = f"{blocks_per_sm} blocks an SM of {warps} warps, {block} words at a time"
        ways[name] = persistent_read(words, block, warps, blocks_per_sm * sms)
    return Floor(weights.nbytes + cache.nbytes, {name: milliseconds(way) for name, way in ways.items()})


def persistent_read(words: Sequence[torch.Tensor], block: int, warps: int, programs: int) -> Callable[[], object]:
    """A launch of `read_all`."""
    if PAGE_BYTES % (4 * block):
        raise ValueError(f"a page is no multiple of {block} words")
    out = torch.empty(programs, dtype=torch.int32, device=words[0].device)
    first, second = words

    def launch() -> object:
        return read_all[(programs,)](
            first, first.numel() // block, second, second.numel() // block, out, BLOCK=block, num_warps=warps
        )

    return launch


def milliseconds(way: Callable[[], object]) -> float:
    """The median time of one call on the GPU."""
    for _ in range(WARM_UPS):
        way()
    times = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            way()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return median(times)
