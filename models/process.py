"""A command as a process: Ctrl-C anywhere, standard streams that are there, an end at once that leaves nothing half-written.

Imports hardly anything, because all this must be there before what takes seconds to import.  Knows nothing of commands.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130  # exit status, as a shell reports SIGINT
STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))  # by the numbers of their descriptors

before_leaving: list[Callable[[], None]] = []  # called where the process ends at once
_working = False  # a command runs, which copes with KeyboardInterrupt


def begin() -> None:
    """Take charge of this process: its streams, and Ctrl-C, which ends a command anywhere, imports included."""
    open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it was ignored on purpose, as `nohup` does
        signal.signal(signal.SIGINT, _interrupted)
        sys.unraisablehook = _unraisable
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the last of all: what comes then takes no time


def begin_as_module() -> None:
    """`begin` where `python -m` is looking for a command: the package of the command calls it before all other imports."""
    if sys.argv[:1] == ["-m"]:
        begin()


def working(begun: bool) -> None:
    """A command begins, or has said all that it had to say: before and after that Ctrl-C ends the process at once."""
    global _working
    _working = begun


def open_streams() -> None:
    """Make sure that stdin, stdout and stderr are there, and that no character is beyond them.

    Where a shell closed one (`2>&-`), its descriptor would go to the next file that is opened, and `print` would take stdout
    for stderr.
    """
    for descriptor, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a command


def silence(stream: Any) -> None:
    """What is written to a stream goes nowhere from here on: Python flushes as it exits, and would fail once more."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass  # a stream without a descriptor, or a closed one, has nothing to fail with


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C.  An import must not be left by an exception: libraries take it for a failure of theirs, or drop it."""
    if not _working or _in_import(frame):
        _leave()
    raise KeyboardInterrupt


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(problem: Any) -> None:
    """Ctrl-C in a destructor, where Python would print the exception and go on."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(problem)


def _leave() -> NoReturn:
    for prepare in before_leaving:
        prepare()
    os._exit(INTERRUPTED)
