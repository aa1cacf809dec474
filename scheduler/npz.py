"""Arrays out of an `.npz` file that may be anything: how large one is stands in the file, and is read before it is.

Knows nothing of what the arrays mean.  Raises ValueError, or what zipfile and NumPy raise, for a file that is none.
"""

from __future__ import annotations

import io
import math
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

END = struct.Struct("<4s4H2LH")  # the record that ends a zip file: signature, 2 disks, 2 counts, size, offset, comment
END_SIGNATURE, END64_SIGNATURE = b"PK\x05\x06", b"PK\x06\x07"
END64_BYTES = 20  # of the record that stands before it where one of its numbers is too small
MOST_MEMBERS, MOST_DIRECTORY = 32, 8192  # in arrays, in bytes
HEADER_BYTES = 64 * 1024  # of a member beside its numbers: the header of the array


class Arrays:
    """An open `.npz` file."""

    def __init__(self, file: IO[bytes]) -> None:
        require_small_directory(file)
        self._zip = zipfile.ZipFile(file)

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._zip.namelist()

    def array(self, name: str, most: int) -> np.ndarray:
        """An array of at most `most` bytes."""
        member = self._zip.getinfo(f"{name}.npy")
        if member.file_size > most + HEADER_BYTES:
            raise ValueError(f"{name} has {member.file_size} bytes, more than {most}")
        data = io.BytesIO(self._zip.read(member))
        require_size(data, name)
        return np.load(data, allow_pickle=False)


@contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """Open an `.npz` file.  What is no regular file is not opened at all: a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no regular file")
    with path.open("rb") as file:
        yield Arrays(file)


def require_small_directory(file: IO[bytes]) -> None:
    """Refuse a zip file whose list of members would take long to read; NumPy writes no comment after it."""
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - END.size - END64_BYTES))
    tail = file.read()
    if len(tail) < END.size or tail[-END.size :][:4] != END_SIGNATURE:
        raise ValueError("no zip file")
    _, _, _, _, members, size, _, comment = END.unpack(tail[-END.size :])
    if tail.startswith(END64_SIGNATURE) or members > MOST_MEMBERS or size > MOST_DIRECTORY or comment:
        raise ValueError(f"{members} members, more than {MOST_MEMBERS}")


def require_size(data: io.BytesIO, name: str) -> None:
    """Refuse an array whose header claims other bytes than follow, for its memory would be taken first."""
    version = np.lib.format.read_magic(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read_header(data)
    claimed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or claimed != len(data.getbuffer()) - data.tell():
        raise ValueError(f"{name} is no array of numbers of the size that it claims")
    data.seek(0)
