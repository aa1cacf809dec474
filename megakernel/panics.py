"""Errors of the tokenizers library as the user should see them: in one line, also where its Rust panics.

A panic reaches Python as a class that cannot be imported and is no Exception, after it wrote a report of many lines to
stderr itself. Knows nothing of what is asked of the library.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from models.errors import UserError

_STDERR = 2
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """What the library cannot do within it is a UserError: `what`, then the library's reason."""
    try:
        with _ONE_AT_A_TIME, _stderr_held_back():
            yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise UserError(f"{what}: {error}") from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


@contextmanager
def _stderr_held_back() -> Iterator[None]:
    """What is written to stderr within it, by whomever, comes out at its end; not where that is a panic."""
    try:
        stderr = os.dup(_STDERR)
    except OSError:  # closed
        yield
        return
    held = _held_back()
    try:
        os.dup2(held, _STDERR)
        yield
    except BaseException as error:
        if _is_panic(error):
            os.lseek(held, 0, os.SEEK_SET)
        raise
    finally:
        os.dup2(stderr, _STDERR)
        os.close(stderr)
        if size := os.lseek(held, 0, os.SEEK_CUR):
            os.lseek(held, 0, os.SEEK_SET)
            os.write(_STDERR, os.read(held, size))
            os.lseek(held, 0, os.SEEK_SET)


@cache
def _held_back() -> int:
    """A file in memory, one for all times: this is asked for at every token."""
    return os.memfd_create("stderr")
