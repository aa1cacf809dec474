"""A model's chat template, which makes one text of a conversation.

It is a program in Jinja, out of a file that may come from anybody: it is rendered in a sandbox, in a process of its own, which
stays for the next conversation and is ended when it takes too long.  Knows nothing of tokens.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from megakernel import template_process
from models.errors import UserError
from models.files import read_json_object, read_regular

_BYTES = 2**20  # of a template
_SECONDS = 10.0  # until it is given up; twice its time of computing, for a machine may be busy
_READ = 1 << 16

Message = dict[str, Any]  # "role", "content", and what else a template may look at


class ChatTemplate:
    """A template with the special tokens that it may name.  May be used by several threads."""

    def __init__(self, source: str, variables: dict[str, str], origin: Path) -> None:
        self._source, self._variables, self._origin = source, variables, origin
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    @classmethod
    def of(cls, directory: Path) -> ChatTemplate:
        """From `chat_template.jinja`, else from `tokenizer_config.json`; UserError where there is neither."""
        config_path, template_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        config = _read_json(config_path)
        if os.path.exists(template_path):
            source: Any = _read(template_path)
        else:
            template_path, source = config_path, config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = (entry for entry in source if isinstance(entry, dict))
            source = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            raise no_template(directory)
        special = _read_json(directory / "special_tokens_map.json") | config
        spelled = {name: _spelling(value) for name, value in special.items() if name.endswith("_token")}
        return cls(source, {name: text for name, text in spelled.items() if text is not None}, template_path)

    def render(self, messages: list[Message]) -> str:
        """The conversation as text, with the assistant's turn opened.  UserError where the template refuses or fails,
        does not end, takes too much memory, or writes what is no text."""
        variables = {"tools": None, "documents": None, **self._variables}
        request = {"messages": messages, "add_generation_prompt": True, **variables}
        with self._one_at_a_time:
            answer = self._ask({"path": sys.path, "source": self._source, "variables": request})
        if "refused" in answer:
            raise UserError(f"the chat template in {self._origin} refuses this prompt: {answer['refused']}")
        if "failed" in answer:
            raise self._failure(answer["failed"])
        try:
            answer["text"].encode()
        except UnicodeEncodeError:
            raise self._failure("it writes half a surrogate pair") from None
        return answer["text"]

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        """What the process answers.  It stays, unless it failed, took too long, or this process was interrupted."""
        process = self._started()
        try:
            answer = self._exchange(process, json.dumps(request).encode() + b"\n")
        except BaseException:
            self._end()
            raise
        if "failed" in answer:
            self._end()
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        command = [sys.executable, "-I", "-S", template_process.__file__]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise self._failure(f"{sys.executable} cannot be started ({error.strerror})") from None
        self._process = process
        weakref.finalize(self, _end, process)
        return process

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes) -> dict[str, str]:
        """One line there, one line back."""
        assert process.stdin is not None and process.stdout is not None
        end, answer = time.monotonic() + _SECONDS, b""
        with suppress(BrokenPipeError):  # it has ended, as is found out below
            process.stdin.write(request)
            process.stdin.flush()
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise self._failure(f"it takes more than {_SECONDS:g} s")
            chunk = os.read(process.stdout.fileno(), _READ)
            if not chunk:
                raise self._failure(_ended(process.wait()))
            answer += chunk
        parsed: dict[str, str] = json.loads(answer)
        return parsed

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _failure(self, reason: str) -> UserError:
        return UserError(f"the chat template in {self._origin} failed: {reason}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it now, and leave nothing of it."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # of what it has not read
                pipe.close()


def _ended(status: int) -> str:
    """Why the process ended in the middle of its work."""
    if -status in (signal.SIGXCPU, signal.SIGKILL):  # of the limit on its time, soft or hard
        return f"it takes more than {template_process.SECONDS} s"
    return f"it ended the process that renders it, with status {status}"


def no_template(place: Path) -> UserError:
    return UserError(f"{place} has no chat template: leave out --chat, or name a model tuned for chat")


def _spelling(token: Any) -> str | None:
    """A special token is saved as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read(path: Path) -> str:
    try:
        return read_regular(path, _BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    return read_json_object(path) if os.path.exists(path) else {}
