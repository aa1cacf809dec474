"""The read floor: the least time in which this GPU reads so many bytes, which no decode step can beat.

    python -m bench.compare.floor BYTES

Sums over a buffer of that size, larger than any cache, by the fastest of a few ways; the last line is JSON.  A process of
its own, so that the buffer is gone before the engines come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median

import torch

WARM_UPS = 5
REPEATS = 25


def measure(size: int) -> dict[str, object]:
    """Bytes a second of the fastest way, and the milliseconds of every way; none without a GPU."""
    if not torch.cuda.is_available():
        return {"bytes_per_second": None, "milliseconds": {}}
    noise = torch.randn(1 << 20, device="cuda", dtype=torch.bfloat16)
    values = noise.repeat(size // (2 * len(noise)) + 1)[: size // 2 // 8 * 8]  # random: zeros can be read faster
    wide = values.view(torch.float32)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "sum of bf16": lambda: values.sum(dtype=torch.float32),
        "sum of fp32": wide.sum,
        "maximum of fp32": wide.amax,
    }
    times = {name: milliseconds(way) for name, way in ways.items()}
    return {"bytes_per_second": values.nbytes / min(times.values()) * 1e3, "milliseconds": times}


def milliseconds(way: Callable[[], torch.Tensor]) -> float:
    """The median time of one call on the GPU."""
    for _ in range(WARM_UPS):
        way()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        way()
        mark.record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False))


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
