"""A conversation as a value: turns, a system message, a file to keep it in.  Knows nothing of models or terminals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import UserError, writing
from models.files import read_json_object
from models.output import write_file

ROLES = ("user", "assistant")


@dataclass
class Conversation:
    """`turns` are messages of the user and the assistant by turns, as chat templates take them."""

    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of it, the system message first where there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def undo(self) -> str | None:
        """Take back the user's last turn and what followed it; the words that were taken back."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return str(turn["content"])
        return None

    def save(self, path: Path) -> None:
        """Write it as JSON.  Raises UserError where it cannot be written."""
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
        with writing(path):
            write_file(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote, or the messages of a request of OpenAI's API.  Raises UserError."""
        messages = read_json_object(path).get("messages")
        if not isinstance(messages, list):
            raise UserError(f"{path} holds no conversation: it needs a list of messages")
        conversation = cls()
        for number, message in enumerate(messages):
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
            if role == "system" and number == 0 and isinstance(content, str):
                conversation.system = content
            elif role in ROLES and isinstance(content, str):
                conversation.say(role, content)
            else:
                raise UserError(
                    f"{path}: message {number} is none of user or assistant with a text, nor a system message first"
                )
        return conversation
