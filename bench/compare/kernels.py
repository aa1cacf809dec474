"""Which kernels run on the GPU during a generation, from PyTorch's profiler: an engine's own, copies and fills, others.

Imported in an engine's own process: the standard library alone at import time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

OWN, MEMORY, OTHER = "own", "memory", "other"
MEMORY_PREFIXES = ("Memcpy", "Memset")  # how the profiler names what the copy engines do,
COPY = "direct_copy_kernel"  # and what is in the name of the kernel by which torch copies memory that is not in one piece
GPU = "CUDA"

Kernel = dict[str, Any]


def watched(generate: Callable[[], None], names: Callable[[], Collection[str]]) -> list[Kernel]:
    """The kernels of a generation, as `tally` has them; `names` is asked afterwards.  Raises RuntimeError where none ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        generate()
        torch.cuda.synchronize()
    kernels = tally(found.events(), names())
    if all(kernel["kind"] == MEMORY for kernel in kernels):
        raise RuntimeError("the profiler saw no kernel: do others use it on this machine?")
    return kernels


def tally(events: Iterable[Any], names: Collection[str]) -> list[Kernel]:
    """A profiler's events on the GPU, by name: what kind it is, how often it ran, and for how many microseconds in all; those
    that took longest first.

    events: `torch.autograd.profiler_util.FunctionEvent`s, or what has their `name`, `device_type`, `time_range` and
        `is_user_annotation`.
    names: the functions that the engine's own kernels are compiled from.
    """
    kernels: dict[str, Kernel] = {}
    for event in events:
        if event.device_type.name != GPU or event.is_user_annotation:
            continue
        entry = {"name": event.name, "kind": kind_of(event.name, names), "count": 0, "microseconds": 0.0}
        kernel = kernels.setdefault(event.name, entry)
        kernel["count"] += 1
        kernel["microseconds"] += event.time_range.elapsed_us()
    return sorted(kernels.values(), key=lambda kernel: (-kernel["microseconds"], kernel["name"]))


def kind_of(name: str, names: Collection[str]) -> str:
    """OWN, MEMORY or OTHER."""
    if name.startswith(MEMORY_PREFIXES) or COPY in name:
        return MEMORY
    return OWN if name in names else OTHER
