"""Reads and checks the header of one safetensors file, so that a damaged file is named before any tensor is touched.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, little-endian; a JSON object of name ->
dtype, shape and offsets into the rest of the file, which it covers without holes). Knows nothing of which tensors a
model needs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from models.errors import UserError

LENGTH_BYTES = 8
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # other types are legal here, and refused by those who need the tensor


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its safetensors type name, shape, and bytes [start, stop) after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file in the order of its bytes. Raises `UserError` that names the file, and the tensor if one
    is at fault."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if size <= LENGTH_BYTES:
                raise UserError(f"{path}: only {size} bytes long, too short for a safetensors file, download it anew")
            if length > min(size - LENGTH_BYTES, HEADER_LIMIT):
                raise UserError(f"{path}: header of {length} bytes in a file of {size}: damaged or cut off, download it anew")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}, download it anew") from None
    entries = {name: _entry(path, name, fields) for name, fields in _parse(path, raw).items() if name != "__metadata__"}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_coverage(path, ordered, size - LENGTH_BYTES - length)
    return ordered


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: {twice} stands twice in the header, save the file anew")
        return values

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: header is not valid JSON ({error}), download it anew") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: header is not a JSON object, download it anew")
    return header


def _entry(path: Path, name: str, fields: Any) -> Entry:
    values = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: tensor {name} has a bad header entry (dtype, shape, data_offsets), download the file anew")
    start, stop = offsets
    bytes_needed = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if start > stop or (dtype in ITEM_BYTES and stop - start != bytes_needed):
        raise UserError(
            f"{path}: tensor {name} has offsets {start} to {stop}, but {dtype} {shape} takes {bytes_needed} bytes, "
            "download the file anew"
        )
    return Entry(dtype, tuple(shape), start, stop)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_coverage(path: Path, entries: dict[str, Entry], data_bytes: int) -> None:
    """The tensors cover the data without holes or overlaps, up to its end."""
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            what = "overlaps another" if entry.start < end else "leaves a hole before it"
            raise UserError(f"{path}: tensor {name} starts at byte {entry.start}, which {what}, download the file anew")
        if entry.stop > data_bytes:
            raise UserError(
                f"{path}: cut off within tensor {name}, {entry.stop - data_bytes} bytes short, download the file anew"
            )
        end = entry.stop
    if end != data_bytes:
        raise UserError(f"{path}: {data_bytes - end} bytes after the last tensor, download the file anew")
