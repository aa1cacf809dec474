"""What a shell completes when Tab is pressed: argcomplete runs the command, which says what may follow in place of doing it.

    eval "$(register-python-argcomplete llama-megakernel)"

Nothing of it is imported unless a shell asks.
"""

from __future__ import annotations

import argparse
import os

ASKED = "_ARGCOMPLETE"  # of the environment: set by the shell, to the first word of the line that is the parser's


def asked() -> bool:
    """Whether a shell asks what may follow, and nothing is to be done."""
    return ASKED in os.environ


def line() -> tuple[list[str], str]:
    """The words on the line before the one that is being completed, without the program, and the beginning of that one."""
    from argcomplete.lexers import split_line

    _, begun, _, words, _ = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    return words[1:], begun


def skip(count: int) -> None:
    """The parser that is asked next knows nothing of so many words."""
    os.environ[ASKED] = str(int(os.environ[ASKED]) + count)


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell what the parser can take there, and end the process, where a shell asks."""
    if asked():
        from argcomplete import autocomplete

        autocomplete(parser)
