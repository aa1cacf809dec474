"""The tensors of a GGUF file under Hugging Face's names, one at a time and a piece at a time: what is kept in blocks is handed
over in codes where a format holds it, else it is widened to bf16 by the `gguf` library, which has its formulas.

Only the tensor that is handed over is in memory, and some pieces on their way into it. Knows nothing of configurations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from models.errors import UserError
from models.files import open_regular
from models.formats import Packed
from models.gguf.blocks import codes_of, empty
from models.gguf.header import Tensor
from models.quantised import Quantised

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
BLOCKED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
SUPPORTED = (*(kind.name for kind in PLAIN), *BLOCKED)
PIECE_ELEMENTS = 2**17  # what one thread widens at a time: all that the library makes on the way stays in its cache
MOST_THREADS = 8


@dataclass(frozen=True)
class Place:
    """Where a tensor of the network comes from. `heads`: of how many heads its rows are those of, where they stand pair by pair
    and are wanted in halves; else 0. `format`: in whose codes it is handed over, None for numbers."""

    name: str
    tensor: Tensor
    heads: int = 0
    format: Packed | None = None


@dataclass(frozen=True)
class GgufSource:
    """A `WeightSource` over checked files: codes or bf16, but fp16 and fp32 where they are kept so."""

    places: tuple[Place, ...]  # in the order of their bytes

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """See `WeightSource`. Raises `UserError` where a file changed since it was checked, and for scales that are too
        large for their format."""
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
            path: Path | None = None
            file: BinaryIO | None = None
            try:
                for place in self.places:
                    if file is None or place.tensor.path != path:
                        if file is not None:
                            file.close()
                        path, file = place.tensor.path, open_regular(place.tensor.path)
                    read = read_tensor if place.format is None else read_codes
                    yield place.name, read(file.fileno(), place, threads)
            finally:
                if file is not None:
                    file.close()
                threads.shutdown(cancel_futures=True)


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which a tensor is handed over. Raises `UserError` for one that cannot be read."""
    if tensor.kind in PLAIN:
        return PLAIN[tensor.kind]
    if tensor.kind.name in BLOCKED:
        return torch.bfloat16
    raise UserError(
        f"{tensor.path}: tensor {tensor.name} is {tensor.kind.name}, which is not supported: "
        f"take a file in {', '.join(SUPPORTED)}"
    )


def read_tensor(file: int, place: Place, threads: ThreadPoolExecutor | None = None) -> torch.Tensor:
    """One tensor of an open file, widened, its rows in Hugging Face's order."""
    tensor = place.tensor
    columns = tensor.shape[-1]
    rows = int(np.prod(tensor.shape[:-1]))
    values = torch.empty(rows, columns, dtype=stored_dtype(tensor))
    order = torch.from_numpy(halves_first(rows * columns if len(tensor.shape) == 1 else rows, place.heads))
    if len(tensor.shape) == 1:  # a bias, whose elements are what a matrix has rows of
        values[0, order] = _piece(file, tensor, 1, columns, 0)[0]
        return values[0]

    def fill(start: int, stop: int) -> None:
        values[order[start:stop] if place.heads else slice(start, stop)] = _piece(file, tensor, stop - start, columns, start)

    _each_piece(fill, rows, columns, threads)
    return values.view(tensor.shape)


def read_codes(file: int, place: Place, threads: ThreadPoolExecutor | None = None) -> Quantised:
    """A matrix of an open file in the codes of its format, its rows in Hugging Face's order."""
    tensor, format = place.tensor, place.format
    assert format is not None
    rows, columns = tensor.shape
    order = torch.from_numpy(halves_first(rows, place.heads))
    room = empty(rows, columns, format)

    def fill(start: int, stop: int) -> None:
        block, size = GGML_QUANT_SIZES[tensor.kind]
        raw = np.frombuffer(_bytes_of(file, tensor, stop - start, columns, start), np.uint8)
        try:
            found = codes_of(raw.reshape(stop - start, columns // block, size), tensor.kind.name, format)
        except UserError as error:
            raise UserError(f"{tensor.path}: tensor {tensor.name} {error}") from None
        for into, part in zip(room.tensors(), found.tensors(), strict=True):
            if into is not None and part is not None:
                into[order[start:stop]] = part

    _each_piece(fill, rows, columns, threads)
    return Quantised(format, room, columns)


def _each_piece(fill: Callable[[int, int], None], rows: int, columns: int, threads: ThreadPoolExecutor | None) -> None:
    """Call `fill` with the rows of every piece, first and last."""
    step = max(1, PIECE_ELEMENTS // columns)
    each: Callable[..., Iterator[None]] = map if threads is None else partial(threads.map)
    starts = range(0, rows, step)
    for _ in each(fill, starts, [min(rows, start + step) for start in starts]):
        pass


def halves_first(rows: int, heads: int) -> np.ndarray:
    """Where each row of a file belongs: int64 [rows]. With no heads every row stays.

    Row 2 i + p of a head is the first (p = 0) or the second (p = 1) that RoPE's rotation i turns, which Hugging Face keeps at
    i + p head_dim / 2.
    """
    places = np.arange(rows)
    if heads:
        places = places.reshape(heads, 2, -1).swapaxes(1, 2).reshape(rows)
    return places


def _piece(file: int, tensor: Tensor, rows: int, columns: int, start: int) -> torch.Tensor:
    """Rows of a tensor from `start` on, as they stand in the file: [rows, columns]."""
    raw = _bytes_of(file, tensor, rows, columns, start)
    if tensor.kind in PLAIN:
        return torch.frombuffer(raw, dtype=PLAIN[tensor.kind]).view(rows, columns)
    with np.errstate(all="ignore"):  # what is not finite is found, and named, where it is packed
        wide = dequantize(np.frombuffer(raw, np.uint8).reshape(1, -1), tensor.kind)  # in one go: of rows it makes small groups
    return torch.from_numpy(wide).to(torch.bfloat16).view(rows, columns)


def _bytes_of(file: int, tensor: Tensor, rows: int, columns: int, start: int) -> bytearray:
    """The bytes of rows from `start` on."""
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    row_bytes = columns // block * block_bytes
    return _read(file, tensor, rows * row_bytes, tensor.start + start * row_bytes)


def _read(file: int, tensor: Tensor, count: int, start: int) -> bytearray:
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        try:
            read = os.preadv(file, [view[done:]], start + done)
        except OSError as error:
            raise UserError(f"{tensor.path}: tensor {tensor.name} cannot be read: {error.strerror}") from None
        if not read:
            raise UserError(f"{tensor.path}: cut off within tensor {tensor.name} since it was opened, download it anew")
        done += read
    return content
