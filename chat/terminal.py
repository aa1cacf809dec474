"""How a chat looks: a line to type in, with history and editing, and answers as they come.

Enter sends, Alt-Enter begins a new line.  Ctrl-C ends an answer, or empties the line, and never the program; Ctrl-D ends it.
Without a terminal, each line of stdin is a message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import Output
from rich.console import Console

from chat.commands import COMMANDS, Session, obey
from megakernel.text import terminal_safe
from models.command import reason
from models.errors import MachineError, UserError

PROMPT = "> "


def keys() -> KeyBindings:
    """Enter sends; Alt-Enter does not."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class Lines:
    """What the user types, one message after the other.  `history`: a file for it, None where none is to be kept."""

    def __init__(self, history: Path | None, source: Input | None = None, shown: Output | None = None) -> None:
        kept = InMemoryHistory() if history is None else FileHistory(_private(history))
        self._prompt: PromptSession[str] = PromptSession(
            history=kept,
            completer=WordCompleter(list(COMMANDS), sentence=True),
            complete_while_typing=False,
            multiline=True,
            key_bindings=keys(),
            prompt_continuation="  ",
            input=source,
            output=shown,
        )

    def read(self, session: Session) -> Iterator[str]:
        """Messages until Ctrl-D, or until the session is over."""
        while not session.over:
            before, session.again = session.again, ""
            try:
                yield self._prompt.prompt(PROMPT, default=before)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return


class PipedLines:
    """What comes from a file or a pipe, a message a line."""

    def read(self, session: Session) -> Iterator[str]:
        for line in sys.stdin:
            yield line.rstrip("\n")
            if session.over:
                return


def talk(session: Session, lines: Lines | PipedLines, console: Console) -> None:
    """The chat, from its first line to its last."""
    for line in lines.read(session):
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                said = obey(session, line)
                if said:
                    console.print(terminal_safe(said), style="dim", markup=False, highlight=False)
            else:
                answer(session, line.strip(), console)
        except (UserError, MachineError, OSError) as error:
            console.print(f"error: {reason(error)}", style="red", markup=False, highlight=False)


def answer(session: Session, message: str, console: Console) -> None:
    """One message and its answer, which streams.  What Ctrl-C leaves of an answer stays in the conversation; where there is
    none, the message goes too."""
    conversation, said, stopped = session.conversation, "", False
    conversation.say("user", message)
    pieces = session.talk.answer(conversation)
    try:
        for piece in pieces:
            said += piece
            console.print(terminal_safe(piece), end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        stopped = True
    finally:
        pieces.close()
        if said:
            conversation.say("assistant", said)
            console.print()
        else:
            conversation.undo()
    note = f"{session.talk.last.line()}{' (interrupted)' if stopped else ''}"
    console.print(note, style="dim", markup=False, highlight=False)


def _private(history: Path) -> str:
    """The file, which nobody else may read."""
    history.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
    return str(history)
