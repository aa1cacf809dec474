"""What every command of this project has in common: how it is asked, how it fails, how it is interrupted.

    @command
    def main(arguments: list[str] | None = None) -> int: ...

    if __name__ == "__main__":
        start(main)

Exit status: 2 with one line on stderr for what the user can mend, 130 after Ctrl-C, 141 when the reader of stdout has gone.
Knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, ParamSpec

from models.completion import answer
from models.errors import MachineError, UserError, printable
from models.process import INTERRUPTED, begin, open_streams, silence, working

USER_ERROR, BROKEN_PIPE = 2, 141  # the latter as a shell reports SIGPIPE
LONGEST_COMPLAINT = 500  # characters about arguments, which may be of any length
WEIGHTS = ("bf16", "fp8", "int4", "q8_0", "q4_0", "q4_1")  # formats that weights may be kept in (`models.formats`)
COLUMNS = (1, 2, 4, 8)  # of a step: of one sequence, or so many sequences
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)))
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

P = ParamSpec("P")
_called = ""


def called(name: str) -> None:
    """By what name the command that runs next was called, for its help, where that is not its own."""
    global _called
    _called = name


class Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other error is reported: in one line.  No abbreviations: a later option must not change
    what one means."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=_called or prog, description=description, allow_abbrev=False, **options)

    def parse_args(self, *given: Any, **named: Any) -> Any:
        answer(self)
        return super().parse_args(*given, **named)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would not say that it cannot be written

    def error(self, message: str) -> NoReturn:
        shown = message if len(message) <= LONGEST_COMPLAINT else message[:LONGEST_COMPLAINT] + "..."
        raise UserError(f"{shown} (see --help)")


MODEL_HELP = "a directory in Hugging Face's layout, a GGUF file, random:<preset>, or, where weights are read, a hub id"


def add_model(parser: argparse.ArgumentParser, default: str | None = None, required: bool = False) -> None:
    """The option that names a model."""
    parser.add_argument(
        "--model",
        default=default,
        required=required,
        help=MODEL_HELP + ("" if default is None else " (default: %(default)s)"),
    )


def add_formats(parser: argparse.ArgumentParser) -> None:
    """--weights and --head: what the matrices are kept as."""
    parser.add_argument("--weights", choices=WEIGHTS, help="what weights are kept as (default: as stored, small ones in bf16)")
    parser.add_argument("--head", choices=WEIGHTS, help="what the LM head is kept as (default: as the other weights)")


def columns(text: str) -> tuple[int, int]:
    """The type of an option that says how many columns: sequences and the columns of each, as "8x1" or "1x8"."""
    names = [f"1x{depth}" for depth in COLUMNS] + [f"{sequences}x1" for sequences in COLUMNS[1:]]
    if text not in names:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {shortened(text)}")
    sequences, depth = map(int, text.split("x"))
    return sequences, depth


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` to `most`, both included."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {shortened(text)}")
        return value

    return convert


def real(least: float, most: float) -> Callable[[str], float]:
    """The type of an option that takes a number from `least` to `most`, both included, and never NaN."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, got {shortened(text)}")
        return value

    return convert


def shortened(text: str) -> str:
    """What the user wrote, quoted, up to some characters of it."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def note(line: str) -> None:
    """Says a line on stderr, without what a terminal obeys.

    Where that cannot be written nobody is listening, and the command goes on.
    """
    try:
        print(line.translate(CONTROLS), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def command(body: Callable[P, int]) -> Callable[P, int]:
    """A `main` that gives an exit status in place of the exceptions that the user can mend or has caused."""

    @wraps(body)
    def main(*args: P.args, **kwargs: P.kwargs) -> int:
        open_streams()
        working(True)
        try:
            try:
                return body(*args, **kwargs)
            finally:
                sys.stdout.flush()  # while it can still be said that it failed
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            silence(sys.stdout)
            return BROKEN_PIPE
        except (UserError, MachineError, OSError, MemoryError) as error:
            note(f"error: {reason(error)}")
            if isinstance(error, OSError):
                silence(sys.stdout)
            return USER_ERROR
        finally:
            working(False)

    return main


def reason(error: UserError | MachineError | OSError | MemoryError) -> str:
    """The error in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory: free some, or ask for less"
    if isinstance(error, UserError | MachineError):
        return printable(str(error))
    what = error.filename
    if what is None and error.errno in UNWRITABLE:
        what = "stdout cannot be written"  # files have names
    return str(UserError(f"{what or 'the system refused'}: {error.strerror or error}"))


def start(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process, and exit with its status."""
    begin()
    try:
        status = main()
    except KeyboardInterrupt:  # in the moment between what `main` catches and its return
        status = INTERRUPTED
    sys.exit(status)
