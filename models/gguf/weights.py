"""The tensors of a GGUF file under Hugging Face's names, one at a time and a piece at a time: what is kept in blocks is widened
to bf16 by the `gguf` library, which has its formulas.

Only the tensor that is handed over is in memory, and some pieces on their way into it. Knows nothing of configurations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from models.errors import UserError
from models.files import open_regular
from models.gguf.header import Tensor

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
    and are wanted in halves; else 0."""

    name: str
    tensor: Tensor
    heads: int = 0


@dataclass(frozen=True)
class GgufSource:
    """A `WeightSource` over checked files: bf16, but fp16 and fp32 where they are kept so."""

    places: tuple[Place, ...]  # in the order of their bytes

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`. Raises `UserError` where a file changed since it was checked."""
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
            path: Path | None = None
            file: BinaryIO | None = None
            try:
                for place in self.places:
                    if file is None or place.tensor.path != path:
                        if file is not None:
                            file.close()
                        path, file = place.tensor.path, open_regular(place.tensor.path)
                    yield place.name, read_tensor(file.fileno(), place, threads)
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

    def fill(start: int) -> None:
        stop = min(rows, start + step)
        values[order[start:stop] if place.heads else slice(start, stop)] = _piece(file, tensor, stop - start, columns, start)

    step = max(1, PIECE_ELEMENTS // columns)
    each: Callable[..., Iterator[None]] = map if threads is None else partial(threads.map)
    for _ in each(fill, range(0, rows, step)):
        pass
    return values.view(tensor.shape)


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
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    row_bytes = columns // block * block_bytes
    raw = _read(file, tensor, rows * row_bytes, tensor.start + start * row_bytes)
    if tensor.kind in PLAIN:
        return torch.frombuffer(raw, dtype=PLAIN[tensor.kind]).view(rows, columns)
    with np.errstate(all="ignore"):  # what is not finite is found, and named, where it is packed
        wide = dequantize(np.frombuffer(raw, np.uint8).reshape(1, -1), tensor.kind)  # in one go: of rows it makes small groups
    return torch.from_numpy(wide).to(torch.bfloat16).view(rows, columns)


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
