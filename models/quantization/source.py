"""The tensors of a quantised checkpoint: which of its matrices are quantised, what else must be there, all of it in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.formats import PLAIN_NAME, Formats
from models.quantization.base import SCALES, Part, Scheme
from models.safetensors_file import open_file, read_tensor
from models.weights import EMBEDDING, HEAD, WeightSource

SUFFIX = "weight"


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix [rows, columns] of a checkpoint: the file of each of its tensors, by its part's name."""

    name: str
    rows: int
    columns: int
    files: dict[str, Path]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint must hold and may hold, by the names of tensors, and which of its matrices are quantised."""

    needed: dict[str, Part]
    optional: dict[str, Part]
    quantised: dict[str, tuple[int, int]]

    @property
    def formats_of(self) -> tuple[bool, bool]:
        """Whether the layers' matrices are quantised, and whether the head is."""
        return any(name != HEAD for name in self.quantised), HEAD in self.quantised


def contents(scheme: Scheme | None, expected: dict[str, tuple[int, ...]], stored: Iterable[str]) -> Contents:
    """By what is stored under which names; raises `UserError` where only some matrices of the layers are quantised, or one is
    whose size does not suit the scheme."""
    found, needed, optional = set(stored), dict[str, Part](), dict[str, Part]()
    quantised: dict[str, tuple[int, int]] = {}
    left: list[str] = []
    for name, shape in expected.items():
        module = name.removesuffix(SUFFIX)
        if scheme is None or len(shape) != 2 or name == EMBEDDING or not _is_quantised(scheme, module, found):
            needed[name] = Part(SCALES, (shape,))
            left += [name] if len(shape) == 2 and name not in (EMBEDDING, HEAD) else []
            continue
        rows, columns = shape
        scheme.check_size(name, rows, columns)
        quantised[name] = rows, columns
        needed |= {module + part: kind for part, kind in scheme.parts(rows, columns).items()}
        optional |= {module + part: kind for part, kind in scheme.optional(rows, columns).items()}
    if left and len(quantised) > (HEAD in quantised):
        raise UserError(f"tensor {left[0]} is not quantised while others are, which is not supported: use another checkpoint")
    return Contents(needed, optional, quantised)


def formats_of(scheme: Scheme | None, found: Contents) -> Formats:
    """What the matrices are kept as if they are taken as they are."""
    names = (PLAIN_NAME if scheme is None or not has else scheme.format.name for has in found.formats_of)
    return Formats(*names)


def _is_quantised(scheme: Scheme, module: str, stored: set[str]) -> bool:
    first = next(iter(scheme.parts(0, 0)))
    return module + first in stored


@dataclass(frozen=True)
class QuantisedSource:
    """A `WeightSource` over checked files: plain tensors, then the quantised matrices."""

    plain: WeightSource
    scheme: Scheme
    matrices: tuple[StoredMatrix, ...]

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """See `WeightSource`; raises `UserError` for values that stand for no numbers."""
        yield from self.plain.tensors()
        for matrix in self.matrices:
            module = matrix.name.removesuffix(SUFFIX)
            parts = {part: read_tensor(path, open_file(path), module + part) for part, path in matrix.files.items()}
            try:
                yield matrix.name, self.scheme.matrix(parts, matrix.rows, matrix.columns)
            except UserError as error:
                raise UserError(f"{next(iter(matrix.files.values()))}: {matrix.name}: {error}") from None
            del parts
