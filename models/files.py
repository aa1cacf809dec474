"""Reads files that may be anything: nothing that blocks, never ends or fills the memory is read.

Knows nothing of what the files are for.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from models.errors import UserError

JSON_BYTES = 2**24  # the largest configurations and indexes are some megabytes
JSON_DEPTH = 100  # of objects and lists in one another: what walks or prints the values need not fear to sink

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, missing: str = "no such file") -> BinaryIO:
    """A regular file, or a link to one, open for reading. Raises `UserError`; `missing` says what is to be done where
    there is nothing."""
    try:
        mode = os.stat(path).st_mode  # before it is opened: that alone can block, or set a device going
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise UserError(f"{path}: cannot be read: it is {kind}, put the file itself there")
        return open(path, "rb", opener=_without_waiting)
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Should the file have become a pipe since it was looked at."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_regular(path: Path, limit: int, missing: str = "no such file") -> bytes:
    """The bytes of a regular file of at most `limit`. Raises `UserError`; see `open_regular`."""
    with open_regular(path, missing) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: more than {limit} bytes, which no such file needs: take it from a sound model")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose value is an object. Raises `UserError` that names the file."""
    content = read_regular(path, JSON_BYTES, "no such file, give the directory of a complete Hugging Face checkpoint")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}), download it anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {json_kind(values)}, not a JSON object, download it anew")
    if _deeper_than(values, JSON_DEPTH):
        raise UserError(f"{path}: not valid JSON (nested more than {JSON_DEPTH} deep), download it anew")
    return values


def _deeper_than(values: Any, limit: int) -> bool:
    level = [values]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def json_kind(value: Any) -> str:
    """What a decoded JSON value is, in words."""
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}.get(
        type(value), "a number"
    )
