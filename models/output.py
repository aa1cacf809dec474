"""Files that commands write: each appears whole or not at all, and nothing but a regular file is ever replaced.

Knows nothing of what is written.
"""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from models.errors import UserError
from models.process import before_leaving

_partial: set[Path] = set()  # files that are being written now


def output_path(text: str) -> Path:
    """The type of an option that names a file or folder to write."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a place to write to")
    if "\0" in text:
        raise argparse.ArgumentTypeError("holds a zero character, which no name may")
    return Path(text)


def require_file(path: Path) -> Path:
    """Where a file of this name really lies, links followed.

    Raises UserError where something else stands there (a folder, a device, a pipe, what `/dev/stdout` leads to), OSError
    where it cannot be written.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is {kind(found.st_mode)}, not a file: name another output")
    if any(os.path.samestat(found, os.fstat(stream)) for stream in range(3)):
        raise UserError(f"{path}: is the file that this command prints to or reads: name another output")
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    return Path(os.path.realpath(path))


def kind(mode: int) -> str:
    """What stands there, in words."""
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file, all of it or nothing: what stood there before stays until the new one is whole.

    Raises UserError as `require_file` does, OSError where it cannot be written; then nothing is left behind.
    """
    target = require_file(path)
    partial = target.with_name(f".{os.urandom(8).hex()}.partial")  # short: the name itself may have the longest length
    _partial.add(partial)
    try:
        with open(partial, "xb") as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(content.encode() if isinstance(content, str) else content)
        partial.replace(target)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None  # the user knows this name, not the other
    finally:
        partial.unlink(missing_ok=True)
        _partial.discard(partial)


def discard_partial_files() -> None:
    """Remove what is being written, for a process that ends in the middle of it."""
    for partial in list(_partial):
        partial.unlink(missing_ok=True)


before_leaving.append(discard_partial_files)
