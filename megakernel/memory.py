"""What memory a model will take, on the host and on a GPU, and whether it is there: asked before any of it is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from instructions.shape import Shape
from megakernel.geometry import COUNTER_STRIDE
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.errors import UserError
from models.formats import PLAIN, Formats
from models.tape import PAGE_BYTES
from models.weights import expected_tensors
from scheduler.buckets import BucketPrograms

GIGABYTE = 10**9
GPU_SLACK = 256 * 1024 * 1024  # bytes for the kernel's code, the programs' words and the CUDA context's own needs
TORCH_SLACK = 256 * 1024 * 1024  # bytes for attention scores, a widened piece of a matrix, and PyTorch's own needs
ROOT = Path("/")
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # of a group's memory, what the kernel gives up first


def gpu_bytes(programs: BucketPrograms, prefill: int = 0) -> dict[str, int]:
    """GPU memory that a model and its programs take, by part; `prefill` bytes of it for reading prompts."""
    shapes = [programs.shape(bucket) for bucket in programs.sizes]
    first = shapes[0]
    return {
        "weights": first.tape.pages * PAGE_BYTES,
        "KV cache": first.cache_pages * PAGE_BYTES,
        "activations": sum(2 * 4 * shape.arena_elements for shape in shapes),  # of a bucket's program and of its tail
        "prefill": prefill,
        "tables": 4 * (first.tape.constant_count + programs.capacity * (first.head_rows + 2)),
        "counters": 2 * len(shapes) * programs.program(0).counters * COUNTER_STRIDE * 4,
        "slack": GPU_SLACK,
    }


def vm_bytes(programs: BucketPrograms, checkpoint: Checkpoint) -> dict[str, int]:
    """Host memory that the CPU machine takes, by part."""
    shapes: list[Shape] = [programs.shape(bucket) for bucket in programs.sizes]
    return {
        **packing_bytes(programs, checkpoint),
        "KV cache": shapes[0].cache_pages * PAGE_BYTES,
        # fp32, an int64 epoch, and who stored it last: int32 SM, int64 number
        "activations": sum(shape.arena_elements * (4 + 8 + 4 + 8) for shape in shapes),
    }


def packing_bytes(programs: BucketPrograms, checkpoint: Checkpoint) -> dict[str, int]:
    """Host memory that packing takes: the weights, and the largest tensor, which stands beside its packed copy."""
    tape = programs.shape(programs.capacity).tape
    return {
        "weights": tape.bytes,
        "largest tensor": largest_tensor(checkpoint),
    }


def torch_bytes(config: ModelConfig, dtype: torch.dtype, capacity: int, pass_tokens: int) -> dict[str, int]:
    """Memory of its device that the plain PyTorch backend takes, by part, to read so many tokens of a prompt at a time."""
    shapes = expected_tensors(config).values()
    heads = config.num_heads + 2 * config.num_kv_heads
    cached = 2 * config.num_kv_heads * capacity * config.head_dim  # K and V values of a layer
    widest = max(3 * heads * config.head_dim, 4 * config.intermediate_size) + 4 * config.hidden_size
    return {
        "weights": sum(math.prod(shape) * (dtype.itemsize if len(shape) > 1 else 4) for shape in shapes),
        "KV cache": config.num_layers * cached * dtype.itemsize,
        # fp32: what a pass computes, K and V of one layer, logits, angles
        "activations": 4 * (pass_tokens * widest + cached + 2 * config.vocab_size + 2 * capacity * config.head_dim)
        + TORCH_SLACK,
    }


def largest_tensor(checkpoint: Checkpoint) -> int:
    """Bytes of the largest tensor of a checkpoint, which is in host memory beside what is made of it."""
    return max(math.prod(shape) for shape in expected_tensors(checkpoint.config).values()) * checkpoint.stored_dtype.itemsize


MEND = "free some, or choose a smaller model or capacity"


def mend_of(formats: Formats) -> str:
    """What helps where the weights of these formats are too large for a GPU."""
    return f"say --weights fp8, {MEND}" if formats == PLAIN else MEND


def check_memory(model: str, needs: Mapping[str, int], available: int | None, kind: str = "memory", mend: str = MEND) -> None:
    """Refuse a model that needs more bytes than are available; raises UserError with the figures, largest first."""
    total = sum(needs.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{name} {needs[name] / GIGABYTE:.2f}" for name in sorted(needs, key=lambda name: -needs[name]))
    raise UserError(
        f"{model} needs {total / GIGABYTE:.2f} GB of {kind} ({parts}), {available / GIGABYTE:.2f} GB are available: {mend}"
    )


def available_bytes(root: Path = ROOT) -> int | None:
    """Memory that this process can use without swapping; None where that is not to be known.

    The least of what Linux estimates for the whole machine and of what is left of each limit that a container or a service
    sets: the control groups of this process and all those above it.  `root` is where `proc` and `sys` are found.
    """
    figures = [free for free in (machine_bytes(root), *group_bytes(root)) if free is not None]
    return min(figures, default=None)


def machine_bytes(root: Path) -> int | None:
    """Memory that is free, or could be at once, on the whole machine."""
    for line in lines_of(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def group_bytes(root: Path) -> Iterator[int | None]:
    """What each control group that this process is in leaves of its limit, under version 2 and version 1 alike."""
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from (left(group, "memory.max", "memory.current", "") for group in groups(root / mount, path))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            yield from (left(group, *names) for group in groups(root / "sys/fs/cgroup/memory", path))


def groups(mount: Path, path: str) -> Iterator[Path]:
    """The folders of a group and of all above it.  In a container those of the host are not there; its own is the mount."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def left(group: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    """Bytes that a group may still take; None where it has no limit.  Files that the kernel only caches do not count."""
    limit, usage = number(group / limit_name), number(group / usage_name)
    if limit is None or usage is None:
        return None
    names = {prefix + name for name in RECLAIMABLE}
    rows = (line.split() for line in lines_of(group / "memory.stat"))
    cached = sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)
    return max(0, limit - max(0, usage - cached))


def number(path: Path) -> int | None:
    """The number in a file; None for a word such as "max", or for no file."""
    text = "".join(lines_of(path)).strip()
    return int(text) if text.isdecimal() else None


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none of one that cannot be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
