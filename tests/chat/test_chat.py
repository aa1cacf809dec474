"""The chat: what is kept, what commands do, what is typed and shown, and Ctrl-C in a terminal of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from chat.command import parse
from chat.commands import COMMANDS, Session, obey
from chat.conversation import Conversation
from chat.talk import Talk
from chat.terminal import Lines, talk
from megakernel.request import SamplingParams
from megakernel.text import ModelText
from models.errors import UserError
from tests.support import BUNDLED, ROOT
from tests.support.scripted import FAULT, SLOW, scripted_answer, scripted_engine

CHAT = [sys.executable, "-m", "tests.support.scripted_chat", "--no-history"]


@pytest.fixture
def session() -> Iterator[Session]:
    with scripted_engine() as engine:
        yield Session(Talk(engine, ModelText(BUNDLED), SamplingParams(), 20), Conversation())


def shown(session: Session, *lines: str) -> str:
    """What is printed where these are typed, one after the other."""
    output = StringIO()
    with create_pipe_input() as source:
        source.send_text("".join(lines))
        talk(session, Lines(None, source, DummyOutput()), Console(file=output, width=200))
    return output.getvalue()


def expected(messages: list[dict[str, Any]], count: int = 20) -> str:
    text = ModelText(BUNDLED)
    return text.decode(scripted_answer(text.encode_messages(messages), 2048, count))


def test_a_conversation_is_answered_whole_and_its_beginning_kept(session: Session) -> None:
    printed = shown(session, "one\r", "two\r", "\x04")
    first = expected([{"role": "user", "content": "one"}])
    turns = session.conversation.turns
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert turns[1]["content"] == first and first.split("\n")[0].strip() in printed
    assert turns[3]["content"] == expected(turns[:3])
    assert session.talk.last.kept > 3 and "prompt tokens kept" in printed
    assert session.talk.total.answers == 2 and session.talk.total.tokens == 40


def test_alt_enter_begins_a_line_and_ctrl_c_empties_it(session: Session) -> None:
    shown(session, "away\x03", "one\x1b\rtwo\r", "\x04")
    assert session.conversation.turns[0]["content"] == "one\ntwo"


def test_a_message_is_taken_back_and_edited(session: Session) -> None:
    shown(session, "one\r", "/undo\r", " more\r", "\x04")
    assert [turn["content"] for turn in session.conversation.turns if turn["role"] == "user"] == ["one more"]


def test_commands_of_a_chat(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    printed = shown(session, "/system Be brief.\r", "one\r", f"/save {file}\r", "/stats\r", "/help\r", "/reset\r", "/exit\r")
    assert "system message: Be brief." in printed and "context: " in printed and "2 turns saved" in printed
    assert all(name in printed for name in COMMANDS)
    assert session.conversation.turns == [] and session.conversation.system == "Be brief." and session.over
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    obey(session, f"/load {file}")
    assert session.conversation.messages == saved
    assert obey(session, "/system -") == "system message: none"
    assert obey(session, "/undo") == "taken back" and obey(session, "/undo") == "there is nothing to take back"


@pytest.mark.parametrize(
    "line", ["/nonsense", "/save", "/load", "/reset now", "/load /nowhere/at/all", "/save /nowhere/at/all"]
)
def test_a_wrong_command_is_one_line_and_no_end(session: Session, line: str) -> None:
    printed = shown(session, f"{line}\r", "one\r", "\x04")
    assert printed.startswith("error: ") and printed.split("\n")[1] and len(session.conversation.turns) == 2


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"messages": 3}', '{"messages": [3]}', '{"messages": [{"role": "robot", "content": "a"}]}',
     '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "nonsense",
     '{"messages": [{"role": "user", "content": 7}]}'],
)  # fmt: skip
def test_a_file_that_holds_no_conversation(content: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"file\.json"):
        Conversation.load(file)


def test_what_fails_takes_its_message_back_or_keeps_what_came(session: Session) -> None:
    printed = shown(session, "word " * 400 + "\r", f"{FAULT}\r", "one\r", "\x04")
    assert "do not fit" in printed or "the context holds" in printed
    assert "wait 17 of SM 3 expired" in printed
    assert [turn["content"] for turn in session.conversation.turns][::2] == [FAULT, "one"]


def test_an_answer_that_commands_the_terminal_is_shown_as_text(session: Session) -> None:
    session.talk.answer = lambda conversation: (piece for piece in ["a\x1b[2Jb", "[red]c"])  # type: ignore[method-assign]
    printed = shown(session, "one\r", "\x04")
    assert "a[2Jb[red]c" in printed and "\x1b" not in printed


def test_options_have_the_defaults_of_their_fields() -> None:
    assert parse(["--system", "a", "--no-history"]).system == "a"
    with pytest.raises(UserError, match="--max-tokens must be 1 or more"):
        parse(["--max-tokens", "0"])


def test_lines_of_a_pipe_are_messages() -> None:
    done = subprocess.run(
        [*CHAT, "--max-tokens", "5"], cwd=ROOT, input="one\n\n/stats\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert expected([{"role": "user", "content": "one"}], 5).strip() in done.stdout and "context: " in done.stdout


def test_ctrl_c_ends_an_answer_and_not_the_program() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(CHAT, cwd=ROOT, stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    try:
        screen = Screen(parent)
        screen.until(r"Ctrl-D ends[\s\S]*>")
        screen.type(f"{SLOW}\r")
        screen.until(re.escape(expected([{"role": "user", "content": SLOW}], 8)[:20]))
        process.send_signal(signal.SIGINT)
        screen.until(r"\(interrupted\)")
        screen.type("/stats\r")
        screen.until("context: ")
        screen.type("\x04")
        screen.until(None)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)


class Screen:
    """What a terminal is written; answers where it is asked for its cursor."""

    def __init__(self, terminal: int) -> None:
        self.terminal, self.text = terminal, ""

    def type(self, keys: str) -> None:
        """Press keys once the prompt is there: what is typed before is thrown away, as terminals do."""
        time.sleep(0.7)
        os.write(self.terminal, keys.encode())

    def until(self, pattern: str | None, seconds: float = 40) -> None:
        """Read on until the pattern comes, or with None to the end; forget what has been read."""
        end = time.monotonic() + seconds
        while pattern is None or not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text
            if not select.select([self.terminal], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:  # the other end has closed
                assert pattern is None, self.text
                return
            if "\x1b[6n" in chunk:
                os.write(self.terminal, b"\x1b[1;1R")
            self.text += chunk
        self.text = ""
