"""What a benchmark that needs no GPU says of where it ran."""

from __future__ import annotations

import os
import platform

import numpy as np


def host() -> dict[str, object]:
    """Processors and kind of machine, and the versions that such a benchmark depends on."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
