"""The state of the machine: what stands in a record, and the GPU's clocks and temperature while engines run.

Asks `nvidia-smi`, so that the process which drives the comparison holds no GPU itself.  Without one everything about the
GPU is None.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "used_mib": "memory.used",
}
PATIENCE = 10  # seconds
PROBED_BYTES = 1 << 16


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
