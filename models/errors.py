"""The one exception for what the user can mend: bad input, a bad file, a request that does not fit. Knows nothing of
what raised it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HEAD, _TAIL = 1500, 500  # characters of a long message that are shown: of its beginning and of its end


class UserError(Exception):
    """Something the user can mend. The message is one line that names the thing and the mend; the CLI prints it and
    exits 2. Whatever it quotes is made harmless to a terminal: see `printable`."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MachineError(RuntimeError):
    """The machine, a compiler or the model's own numbers failed; nothing is wrong with what was asked.  A command ends as it
    does with a `UserError`."""


def printable(text: str) -> str:
    """A text that may hold anything, out of any file, as one line that a terminal only shows: blanks for line breaks,
    escapes for what is no visible character, an ellipsis for the middle of what is very long."""
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} … {text[-_TAIL:]}"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in " ".join(text.split()))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def quoted(value: Any) -> str:
    """`repr`, which an integer of thousands of digits has not."""
    try:
        return repr(value)
    except ValueError:
        return "an integer of too many digits to show"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written within it, at `path` or where the error says, is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written ({error.strerror})") from None
