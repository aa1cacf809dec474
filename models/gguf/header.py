"""Reads and checks the header of one GGUF file: its key-value pairs, and where which tensor lies.

Every count and every length is held against what a model needs and what is left of the file before anything is made for it, so
that a damaged or hostile file costs neither time nor memory. Knows nothing of what keys and tensors mean.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from models.errors import UserError, quoted
from models.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 2**26  # three times the largest tokenizers
MOST_KEYS = 2**12
MOST_TENSORS = 2**16  # a Llama of 4,096 layers has 37,000
MOST_ITEMS = 2**21  # of all arrays together, in items; the largest tokenizers have half as many tokens, types and merges
KEY_BYTES, NAME_BYTES, STRING_BYTES = 2**8, 2**8, 2**20
MOST_DIMENSIONS = 4  # ggml's own limit
SIZE_LIMIT = 2**48  # bytes and elements; keeps products small enough to be printed
DEFAULT_ALIGNMENT, MOST_ALIGNMENT = 32, 2**20
ALIGNMENT_KEY = "general.alignment"

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<B",
}
_LENGTH, _NUMBER = struct.Struct("<Q"), struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: how its values are kept, its shape with rows first, and its bytes [start, start + size) of the
    file."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """`values` holds Python's own numbers, booleans and strings, lists of strings, and NumPy's arrays of all other items."""

    path: Path
    values: dict[str, Any]
    tensors: tuple[Tensor, ...]  # in the order of their bytes


def read_header(path: Path) -> Header:
    """The header of a file. Raises `UserError` that names the file, and the key or the tensor at fault."""
    with open_regular(path) as file:
        try:
            return _Reader(path, file).header()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}, download it anew") from None


class _Reader:
    """One pass over a file's header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._place, self._items = 0, 0

    def header(self) -> Header:
        self._check_kind()
        tensors, keys = self._count("tensors", MOST_TENSORS), self._count("keys", MOST_KEYS)
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("a key", KEY_BYTES)
            if key in values:
                raise self._bad(f"key {key} stands twice")
            values[key] = self._value(key, self._value_kind(key))
        infos: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._string("a tensor's name", NAME_BYTES)
            if name in infos:
                raise self._bad(f"tensor {name} stands twice")
            infos[name] = self._tensor(name)
        alignment = self._alignment(values)
        base = self._place + -self._place % alignment
        placed = [Tensor(self._path, name, *info[:2], base + info[2], info[3]) for name, info in infos.items()]
        placed.sort(key=lambda tensor: (tensor.start, tensor.size))
        self._check_places(placed, alignment)
        return Header(self._path, values, tuple(placed))

    def _check_kind(self) -> None:
        start = self._take(8, "its first bytes")
        if start[:4] != MAGIC:
            raise self._bad("does not begin as a GGUF file does")
        version = int.from_bytes(start[4:], "little")
        if version not in VERSIONS:
            if int.from_bytes(start[4:], "big") in VERSIONS:
                raise UserError(f"{self._path}: is big-endian, which is not supported: take a little-endian file")
            raise UserError(f"{self._path}: GGUF version {version} is not supported: take a file of version 2 or 3")

    def _count(self, what: str, most: int) -> int:
        count = self._unpack(_LENGTH, f"the number of {what}")
        if count > most:
            raise self._bad(f"says that it holds {count} {what}, more than {most}")
        return count

    def _value_kind(self, key: str) -> GGUFValueType:
        number = self._unpack(_NUMBER, f"the type of {key}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._bad(f"key {key} has type {number}, which does not exist") from None

    def _value(self, key: str, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string(key, STRING_BYTES)
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        value = self._unpack(struct.Struct(_SCALARS[kind]), key)
        if kind is GGUFValueType.BOOL:
            if value > 1:
                raise self._bad(f"key {key} is {value}: neither true nor false")
            return bool(value)
        if kind is GGUFValueType.FLOAT32 and math.isfinite(value):
            return float(np.format_float_scientific(np.float32(value)))  # the shortest number that is the same in fp32
        return value

    def _array(self, key: str) -> Any:
        kind = self._value_kind(key)
        if kind is GGUFValueType.ARRAY:
            raise UserError(f"{self._path}: key {key} is a list of lists, which is not supported: take another file")
        count = self._unpack(_LENGTH, f"the length of {key}")
        self._items += count
        if self._items > MOST_ITEMS:
            raise self._bad(f"key {key} is a list of {count}, with those before it more than {MOST_ITEMS}")
        if kind is GGUFValueType.STRING:
            return [self._string(key, STRING_BYTES) for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind].replace("B", "u1").replace("b", "i1"))
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _tensor(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int, int]:
        """How it is kept, its shape, where it begins after the header, and its size in bytes."""
        dimensions = self._unpack(_NUMBER, f"the shape of tensor {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._bad(f"tensor {name} has {dimensions} dimensions, where 1 to {MOST_DIMENSIONS} can be")
        shape = tuple(self._unpack(_LENGTH, f"the shape of tensor {name}") for _ in range(dimensions))[::-1]
        if min(shape) < 1 or math.prod(shape) >= SIZE_LIMIT:
            raise self._bad(f"tensor {name} has shape {list(shape)}, which no tensor has")
        number, start = (
            self._unpack(_NUMBER, f"the type of tensor {name}"),
            self._unpack(_LENGTH, f"the place of tensor {name}"),
        )
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(
                f"{self._path}: tensor {name} has type {number}, which is not known here: take a file in Q8_0 or Q4_K"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._bad(
                f"tensor {name} has rows of {shape[-1]}, no multiple of the {block} that {kind.name} keeps together"
            )
        return kind, shape, start, math.prod(shape) // block * size

    def _alignment(self, values: dict[str, Any]) -> int:
        alignment = values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(f"{ALIGNMENT_KEY} is {quoted(alignment)}: it must be a power of two from 8 to {MOST_ALIGNMENT}")
        return alignment

    def _check_places(self, tensors: list[Tensor], alignment: int) -> None:
        """Every tensor lies where the format allows, within the file, and shares no byte with another."""
        for tensor, before in zip(tensors, [None, *tensors], strict=False):
            if tensor.start % alignment:
                raise self._bad(f"tensor {tensor.name} starts at byte {tensor.start}, no multiple of {alignment}")
            if before is not None and tensor.start < before.start + before.size:
                raise self._bad(f"tensor {tensor.name} starts at byte {tensor.start}, within {before.name}")
            if tensor.start + tensor.size > self._size:
                missing = tensor.start + tensor.size - self._size
                raise UserError(f"{self._path}: cut off within tensor {tensor.name}, {missing} bytes short, download it anew")

    def _string(self, what: str, most: int) -> str:
        length = self._unpack(_LENGTH, what)
        if length > most:
            raise self._bad(f"{what} is a text of {length} bytes, more than {most}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not valid UTF-8") from None

    def _unpack(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack(self._take(layout.size, what))[0]

    def _take(self, count: int, what: str) -> bytes:
        self._place += count
        if self._place > min(self._size, HEADER_BYTES):
            where = f"ends within {what}" if self._place > self._size else f"has a header of more than {HEADER_BYTES} bytes"
            raise self._bad(where)
        content = self._file.read(count)
        if len(content) < count:
            raise self._bad(f"ends within {what}")
        return content

    def _bad(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}: damaged or no sound GGUF file, download it anew")
