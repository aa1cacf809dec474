"""Opens a safetensors file and reads a tensor of it; what the library raises becomes one line that names the file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.errors import UserError


def open_file(path: Path) -> safe_open:
    """The file, mapped into memory."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({error}), download it anew") from None
    except RuntimeError as error:  # torch's, which maps the file
        raise UserError(f"{path}: cannot be opened ({error}), use a machine with more memory, or a smaller model") from None


def read_tensor(path: Path, file: safe_open, name: str, place: tuple[int, slice] | None = None) -> torch.Tensor:
    """A tensor, which is a view of the file, or some rows of one matrix of several."""
    try:
        if place is None:
            return file.get_tensor(name)
        number, rows = place
        return file.get_slice(name)[number : number + 1, rows][0]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({error}), download it anew") from None
