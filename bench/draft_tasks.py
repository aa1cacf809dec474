"""The prompts of `bench.drafts`: tasks that copy much of what they are given, and questions that copy nothing.

They lie in `bench/draft_tasks.json`, a list of objects with the fields of `Task`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megakernel.text import codec_of
from models.checkpoint import Checkpoint
from models.errors import UserError
from models.files import JSON_BYTES, read_regular

TASKS = Path(__file__).with_name("draft_tasks.json")
COPY, CHAT = KINDS = ("copy", "chat")


@dataclass(frozen=True)
class Task:
    """One prompt: its name, COPY or CHAT, and its text."""

    name: str
    kind: str
    prompt: str


def read_tasks(path: Path = TASKS) -> list[Task]:
    """All tasks of a file.  Raises UserError that names it."""
    try:
        entries = json.loads(read_regular(path, JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    names = {field.name for field in fields(Task)}
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: is no list of tasks")
    for number, entry in enumerate(entries, 1):
        good = isinstance(entry, dict) and entry.keys() == names and all(isinstance(v, str) and v for v in entry.values())
        if not good or entry["kind"] not in KINDS:
            raise UserError(f"{path}: task {number} must have a name, a kind ({' or '.join(KINDS)}) and a prompt")
    if len({entry["name"] for entry in entries}) < len(entries):
        raise UserError(f"{path}: two tasks have one name")
    return [Task(**entry) for entry in entries]


def prompts_of(checkpoint: Checkpoint, tasks: Sequence[Task], chat: bool = True) -> list[list[int]]:
    """The tasks' token ids, in the model's chat template or, without `chat`, as they are.  Raises UserError."""
    codec = codec_of(checkpoint)
    encode = codec.encode_chat if chat else codec.encode
    return [encode(task.prompt) for task in tasks]
