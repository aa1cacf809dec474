"""The read floor: the least time in which this GPU reads so many bytes, which no decode step can beat.

    python -m bench.compare.floor BYTES

The same measurement as `bench.decode`'s, over a buffer of that size, larger than any cache; the last line is JSON.  A process
of its own, so that the buffer is gone before the engines come.
"""

from __future__ import annotations

import json
import sys

import torch

from bench.read_floor import measure_floor
from models.tape import PAGE_BYTES


def measure(size: int) -> dict[str, object]:
    """Bytes a second of the fastest way, and the milliseconds of every way; none without a GPU."""
    if not torch.cuda.is_available():
        return {"bytes_per_second": None, "milliseconds": {}}
    noise = torch.randn(1 << 20, device="cuda", dtype=torch.bfloat16)  # random: zeros can be read faster
    pages = -(-size // PAGE_BYTES)
    values = noise.repeat(pages * PAGE_BYTES // noise.nbytes + 1)[: pages * PAGE_BYTES // noise.itemsize]
    floor = measure_floor(values, values[:0])
    return {"bytes_per_second": floor.bytes / floor.best * 1e3, "milliseconds": floor.milliseconds}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
