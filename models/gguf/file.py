"""A whole model in GGUF: one file, or the parts that one was split into. Knows nothing of what keys and tensors mean."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError, quoted
from models.gguf.header import MOST_TENSORS, Header, Tensor, read_header
from models.locate import GGUF_PART, MOST_PARTS, part_names


@dataclass(frozen=True)
class GgufFile:
    """A checked file, or a checked set of parts: `path` is the one that the user named, `values` are the first part's."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Tensor]  # in the order of their bytes


def read_gguf(path: Path) -> GgufFile:
    """A file, with the other parts that it names. Raises `UserError` that names the file at fault."""
    first = read_header(path)
    number, count = _split(first)
    if count == 1:
        return GgufFile(path, first.values, {tensor.name: tensor for tensor in first.tensors})
    match = GGUF_PART.fullmatch(path.name)
    if match is None or int(match["number"]) != number + 1 or int(match["count"]) != count:
        raise UserError(
            f"{path}: is part {number + 1} of {count}, but not named so: call it <name>-{number + 1:05}-of-{count:05}.gguf"
        )
    paths = [path.with_name(name) for name in part_names(path.name)]
    if number:
        raise UserError(f"{path}: is part {number + 1} of {count}, give the first one, {paths[0].name}")
    return GgufFile(path, first.values, _collect(first, paths))


def _collect(first: Header, paths: list[Path]) -> dict[str, Tensor]:
    """The tensors of all parts."""
    tensors: dict[str, Tensor] = {}
    for index, path in enumerate(paths):
        if not os.path.exists(path):
            raise UserError(f"{path}: part {index + 1} of {len(paths)} is missing, download it to the same folder")
        header = first if index == 0 else read_header(path)
        if _split(header) != (index, len(paths)):
            raise UserError(f"{path}: says that it is another part than its name does, download it anew")
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise UserError(f"{path}: tensor {tensor.name} is in {tensors[tensor.name].path.name} too, download both anew")
            tensors[tensor.name] = tensor
        if len(tensors) > MOST_TENSORS:
            raise UserError(f"{path}: with the parts before it more than {MOST_TENSORS} tensors, take another model")
    stated = first.values.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise UserError(f"{first.path}: its parts hold {len(tensors)} tensors, it says {quoted(stated)}: download them anew")
    return tensors


def _split(header: Header) -> tuple[int, int]:
    """Which part a file is, from 0, and how many there are."""
    number, count = header.values.get("split.no", 0), header.values.get("split.count", 1)
    count = 1 if count == 0 else count  # as some tools write it for a file that was not split
    if type(number) is not int or type(count) is not int or not 0 <= number < count <= MOST_PARTS:
        raise UserError(
            f"{header.path}: split.no is {quoted(number)} of split.count {quoted(count)}: damaged, download it anew"
        )
    return number, count
