"""What a line that begins with a slash does.  Knows nothing of the terminal: a command gives back what is to be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chat.conversation import Conversation
from chat.talk import Talk
from models.errors import UserError


@dataclass
class Session:
    """A chat: `again` is what the user shall be asked to send once more; `over` ends it."""

    talk: Talk
    conversation: Conversation
    again: str = ""
    over: bool = False


def system(session: Session, words: str) -> str:
    """show the system message, or set it; /system - takes it away"""
    if words:
        session.conversation.system = "" if words == "-" else words
    return f"system message: {session.conversation.system or 'none'}"


def reset(session: Session, words: str) -> str:
    """begin anew; the system message stays"""
    _nothing("/reset", words)
    session.conversation.turns.clear()
    return "the conversation begins anew"


def undo(session: Session, words: str) -> str:
    """take back your last message, to edit and send it again"""
    _nothing("/undo", words)
    session.again = session.conversation.undo() or ""
    return "taken back" if session.again else "there is nothing to take back"


def save(session: Session, words: str) -> str:
    """write the conversation to a file, as JSON"""
    path = _path("/save", words)
    session.conversation.save(path)
    return f"{path}: {len(session.conversation.turns)} turns saved"


def load(session: Session, words: str) -> str:
    """read a conversation from a file"""
    path = _path("/load", words)
    session.conversation = Conversation.load(path)
    return f"{path}: {len(session.conversation.turns)} turns loaded"


def stats(session: Session, words: str) -> str:
    """tokens and times of this chat, and how full the context is"""
    _nothing("/stats", words)
    used = len(session.talk.prompt_of(session.conversation)) if session.conversation.turns else 0
    return (
        f"last: {session.talk.last.line()}\nall: {session.talk.total.line()}\n"
        f"context: {used:,} of {session.talk.capacity:,} tokens"
    )


def help_(session: Session, words: str) -> str:
    """this list"""
    return "\n".join(f"{name:9}{about.__doc__}" for name, about in COMMANDS.items())


def exit_(session: Session, words: str) -> str:
    """end the chat, as Ctrl-D does"""
    session.over = True
    return ""


COMMANDS: dict[str, Callable[[Session, str], str]] = {
    "/system": system,
    "/reset": reset,
    "/undo": undo,
    "/save": save,
    "/load": load,
    "/stats": stats,
    "/help": help_,
    "/exit": exit_,
}


def obey(session: Session, line: str) -> str:
    """What is to be said after a line that begins with a slash.  Raises UserError."""
    name, _, words = line.partition(" ")
    if name not in COMMANDS:
        raise UserError(
            f"{name}: no such command, /help lists them; a message that begins with a slash needs a blank before it"
        )
    return COMMANDS[name](session, words.strip())


def _path(name: str, words: str) -> Path:
    if not words or "\0" in words:
        raise UserError(f"{name} needs the name of a file")
    return Path(words).expanduser()


def _nothing(name: str, words: str) -> None:
    if words:
        raise UserError(f"{name} takes no words after it")
