"""The one exception for what the user can mend: bad input, a bad file, a request that does not fit. Knows nothing of
what raised it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message is one line that names the thing and the mend; the CLI prints it and
    exits 2."""

    def __init__(self, message: str) -> None:
        printable = message.encode("utf-8", "replace").decode()  # names out of a damaged file may hold half characters
        super().__init__(" ".join(printable.split()))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written within it, at `path` or where the error says, is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written ({error.strerror})") from None
