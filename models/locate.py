"""From a model's name to where it lies: a directory in Hugging Face's layout, one file, or what the hub has under an id.

Knows the names of files, and nothing of what is in them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GGUF, SAFETENSORS = ".gguf", ".safetensors"
GGUF_MAGIC = b"GGUF"
GGUF_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MOST_PARTS = 1000

_NAME = r"[A-Za-z0-9_][\w.-]*"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}")
_HUB_GGUF = re.compile(rf"(?P<id>{_NAME}/{_NAME})/(?P<file>(?:{_NAME}/)*{_NAME}\.gguf)")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
_HUB_NOT = ["original/*", "consolidated*", "onnx/*"]


def locate(model: str | Path) -> Path:
    """A directory, or a file in GGUF or safetensors, of that name; else what the hub has, downloaded if need be.

    Raises `UserError` where there is nothing, and for a file of another kind.
    """
    path = Path(model)
    if os.path.isdir(path):  # pathlib's own raises when the name is too long
        return gguf_in(path) or path
    if os.path.exists(path):
        if path.suffix == SAFETENSORS or is_gguf(path):
            return path
        raise UserError(f"{path}: is a file, give the directory that holds config.json, or a GGUF or safetensors file")
    if isinstance(model, str):
        if match := _HUB_GGUF.fullmatch(model):
            return _download_gguf(match["id"], match["file"])
        if _HUB_ID.fullmatch(model):
            return _download(model)
    raise UserError(
        f"{model}: no such directory or file, give a checkpoint directory, a GGUF file, a hub id (owner/name) "
        "or random:<preset>"
    )


def is_gguf(path: Path) -> bool:
    """By its name, or by its first bytes where a program keeps models under names of its own."""
    if path.suffix == GGUF:
        return not os.path.isdir(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def gguf_in(directory: Path) -> Path | None:
    """The one model in GGUF of a directory that holds none in safetensors. Raises `UserError` where there are several."""
    try:
        files = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from None
    if any(name.endswith(SAFETENSORS) or name == INDEX_FILE for name in files):
        return None
    names = [name for name in files if name.endswith(GGUF) and not name.startswith("mmproj")]
    parts = {name: match for name in names if (match := GGUF_PART.fullmatch(name))}
    firsts = [name for name in names if name not in parts or int(parts[name]["number"]) == 1]
    if len(firsts) > 1:
        raise UserError(f"{directory}: holds several models, {firsts[0]} and {firsts[1]} among them: give one of the files")
    return directory / (firsts or names)[0] if names else None


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that a file of this name is a part of; itself where it is whole."""
    match = GGUF_PART.fullmatch(name)
    if match is None or not 1 <= int(match["count"]) <= MOST_PARTS:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{part:05}-of-{count:05}{GGUF}" for part in range(1, count + 1)]


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # here, because a local directory needs no network stack

    return _from_hub(hub_id, lambda: snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_NOT))


def _download_gguf(hub_id: str, file: str) -> Path:
    """One file of a repository, which may hold a dozen of the same model, with the other parts where it was split."""
    from huggingface_hub import hf_hub_download

    names = part_names(file)
    return [_from_hub(f"{hub_id}/{name}", partial(hf_hub_download, hub_id, name)) for name in names][0]


def _from_hub(model: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except Exception as error:  # the network stack has many ways to fail, and they all mean this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{model}: no such directory, and the hub did not give it ({reason}): check the name, the network and "
            "your access, or give a local directory"
        ) from None
