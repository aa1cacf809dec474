"""How much GPU memory a model and its programs take, known before any of it is taken."""

from __future__ import annotations

from megakernel.geometry import COUNTER_STRIDE
from models.tape import PAGE_BYTES
from scheduler.buckets import BucketPrograms

SLACK = 256 * 1024 * 1024  # bytes for the kernel's code, the programs' words and the CUDA context's own needs


def gpu_bytes(programs: BucketPrograms) -> dict[str, int]:
    """GPU memory that a model and its programs take, by part."""
    shapes = [programs.shape(bucket) for bucket in programs.sizes]
    first = shapes[0]
    return {
        "weights": first.tape.pages * PAGE_BYTES,
        "KV cache": first.cache_pages * PAGE_BYTES,
        "activations": sum(4 * shape.arena_elements for shape in shapes),
        "tables": 4 * (first.tape.constant_count + programs.capacity * (first.head_rows + 1)),
        "counters": len(shapes) * programs.program(0).counters * COUNTER_STRIDE * 4,
        "slack": SLACK,
    }
