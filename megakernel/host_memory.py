"""Whether there is the memory that a model will take, on the host or on a GPU, asked before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.errors import UserError

GIGABYTE = 10**9
MEMINFO = Path("/proc/meminfo")


def available_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Memory that new processes can use without swapping, as Linux estimates it; None where that is not to be known."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def check_memory(model: str, needs: Mapping[str, int], available: int | None, kind: str = "memory") -> None:
    """Refuse a model that needs more bytes than are available; raises UserError with the figures, largest first."""
    total = sum(needs.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{name} {needs[name] / GIGABYTE:.2f}" for name in sorted(needs, key=lambda name: -needs[name]))
    raise UserError(
        f"{model} needs {total / GIGABYTE:.2f} GB of {kind} ({parts}), {available / GIGABYTE:.2f} GB are available: "
        "free some, or choose a smaller model or capacity"
    )
