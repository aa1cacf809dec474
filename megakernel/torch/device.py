"""Which device plain PyTorch computes on, and how much of its memory is free."""

from __future__ import annotations

import torch

from megakernel.memory import available_bytes


def best_device() -> torch.device:
    """The accelerator that this PyTorch was built for, where there is one (CUDA, ROCm, MPS, XPU); else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free; None where that is not to be known.  Devices that share the host's have what it has."""
    if device.type == "cpu":
        return available_bytes()
    try:
        return int(torch.accelerator.get_memory_info(device)[0])
    except (RuntimeError, AttributeError, NotImplementedError):
        return available_bytes() if device.type == "mps" else None
