"""What every measurement is recorded with: the machine and its state, the code, the memory taken, the spread of its repeats.

Asks `nvidia-smi`, so that a process which drives others holds no GPU itself.  Without one everything about the GPU is None.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from models.errors import UserError

FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "used_mib": "memory.used",
}
PATIENCE = 10  # seconds
PROBED_BYTES = 1 << 16


@dataclass(frozen=True)
class Spread:
    """The middle, the least and the greatest of some repeats, and the repeats in their order, to six places."""

    median: float
    least: float
    most: float
    runs: list[float]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """From the repeats, of which there is at least one."""
        return cls(median(runs), min(runs), max(runs), [round(run, 6) for run in runs])


def query(fields: Sequence[str]) -> list[str] | None:
    """What nvidia-smi says of the first visible GPU; None where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")] if done.stdout.strip() else []
    return values if len(values) == len(fields) else None


def gpu_state() -> dict[str, float] | None:
    """Clocks (MHz), temperature (°C), power (W) and memory in use by anybody (MiB), as far as the GPU tells them."""
    values = query(list(FIELDS.values()))
    if values is None:
        return None
    state = {}
    for name, value in zip(FIELDS, values, strict=True):
        try:
            state[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return state


def used_mib() -> float | None:
    """GPU memory in use by anybody."""
    return (gpu_state() or {}).get("used_mib")


def describe(root: Path, told: str | None = None) -> dict[str, Any]:
    """What a record says of machine and code; `told` is the commit where git cannot tell."""
    gpu = query(["name", "driver_version", "memory.total"])
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": gpu[0] if gpu else None,
        "driver": gpu[1] if gpu else None,
        "gpu_memory_mib": gpu[2] if gpu else None,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": told or commit(root),
    }


def host() -> dict[str, Any]:
    """What the record of a measurement that needs no GPU says of where it ran."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
    }


def resident_bytes(field: str) -> int:
    """A memory figure of this process from Linux: "VmRSS" now, "VmHWM" at its peak; mapped files count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def processor() -> str:
    """The host's processor: engines that launch kernels from Python are bound by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit(root: Path) -> str | None:
    """The commit of this project, with "+" where files differ from it; None outside a checkout."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def fingerprint(model: Path) -> str:
    """Twelve hexadecimal digits of a checkpoint: its configuration, and of every file of weights its size, first and last
    bytes."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(PROBED_BYTES))
            file.seek(max(0, size - PROBED_BYTES))
            digest.update(file.read(PROBED_BYTES))
    return digest.hexdigest()[:12]
