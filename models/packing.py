"""Copies tensors onto the weight tape and into the constants, one tensor a call, and back again.

The map is `models.tape`; which tensors come, and whether all came, is `models.packed`'s business.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from models.errors import UserError
from models.families.base import HEAD
from models.formats import Packed
from models.formats.base import Codes, page_pieces
from models.quantised import Quantised, pages_of
from models.tape import BLOCK_ROWS, HALF_BLOCK, TILE_BYTES, TILES_PER_PAGE, Matrix, TapeLayout, paired_head_rows

_LINE = np.dtype((np.void, TILE_BYTES))  # one row of one tile, moved as a whole
CHUNKS = 32  # of a quantised page along K
CHUNK_ELEMENTS = 2**22  # what is converted or padded at a time, so that packing needs little memory beside its input
TRIED_ELEMENTS = 2**20  # what is quantised at a time, so that what is tried stays in the processor's caches


def pack_weight(
    layout: TapeLayout,
    matrix: Matrix,
    source: str,
    tensor: torch.Tensor | Quantised,
    weights: torch.Tensor,
    constants: torch.Tensor,
) -> None:
    """Write one source [rows, K] of a matrix into `weights` [pages, page elements], rounding to its dtype or quantising it,
    unless it comes in the format that it is to be kept in; what lies beside quantised pages goes into the constants.

    fp32 and fp16 are rounded to nearest even when the tape is bf16; bf16 and fp16 are exact in fp32. Columns of padding
    are written as zeros; rows of padding belong to no source (`clear_padding_rows`). Raises `UserError` for a value
    that is not finite, or no longer is once it is rounded.
    """
    packed_rows = _packed_rows(matrix, source)
    wide = matrix.pages_per_block * matrix.format.columns
    if isinstance(matrix.format, Packed):
        step = max(1, TRIED_ELEMENTS // wide)
        for start in range(0, len(packed_rows), step):
            codes = _codes(matrix, matrix.format, source, tensor, slice(start, start + step))
            place_codes(matrix, packed_rows[start : start + step], codes, weights, constants)
        return
    lines = _lines(_region(layout, matrix, weights))
    step = max(1, CHUNK_ELEMENTS // wide)
    for start in range(0, len(packed_rows), step):
        target = packed_rows[start : start + step]
        rows = tensor[start : start + step].to(weights.dtype)
        check_finite(source, tensor, rows, start)
        chunk = _pad_columns(matrix, rows)
        lines[target // BLOCK_ROWS, target % BLOCK_ROWS] = _bytes(chunk).view(_LINE)


def _codes(matrix: Matrix, format: Packed, source: str, tensor: torch.Tensor | Quantised, rows: slice) -> Codes:
    """The codes of some rows, as they come or the nearest to the numbers that come."""
    if isinstance(tensor, Quantised) and tensor.format is format:
        if matrix.column_map is not None:
            raise UserError(f"tensor {source}: quantised columns of heads that are padded cannot be taken, say --weights bf16")
        codes = tensor.part(rows)
        if not codes.finite:
            check_finite(source, tensor, tensor[rows], rows.start)  # which says where
        return pages_of(format, codes)
    numbers = tensor[rows].float()
    check_finite(source, tensor, numbers, rows.start)
    return format.quantise(_pad_columns(matrix, numbers))


def place_codes(matrix: Matrix, packed_rows: np.ndarray, codes: Codes, weights: torch.Tensor, constants: torch.Tensor) -> None:
    """Write the codes of some rows of a quantised matrix, at these packed rows."""
    assert isinstance(matrix.format, Packed)
    count, rows = matrix.pages_per_block, torch.from_numpy(packed_rows)
    block, half, row = rows // BLOCK_ROWS, rows % BLOCK_ROWS // HALF_BLOCK, rows % HALF_BLOCK
    words = matrix.format.encode(codes.values).view(torch.int64).view(len(rows), count * CHUNKS, -1)
    page_pieces(_pages(matrix, weights))[block, half, row] = words
    beside = matrix.format.encode_scales(codes)  # [rows, pages, words of a row]
    places = matrix.format.scale_places[rows % BLOCK_ROWS]
    _beside(matrix, constants).view(torch.int32)[block[:, None, None], torch.arange(count)[:, None], places[:, None]] = beside


def check_finite(name: str, tensor: torch.Tensor | Quantised, stored: torch.Tensor, first_row: int = 0) -> None:
    """Raise `UserError` where `stored`, rows of `tensor` from `first_row` on as they are to be kept, is not finite."""
    if _all_finite(stored):
        return
    row, *column = (int(index) for index in (~stored.isfinite()).nonzero()[0])
    place = [first_row + row, *column]
    value = float(tensor[slice(place[0], place[0] + 1)][(0, *column)])
    if math.isfinite(value):
        kind = str(stored.dtype).removeprefix("torch.")
        raise UserError(f"tensor {name} holds {value:g} at {place}, too large for {kind}: use a model with smaller weights")
    raise UserError(f"tensor {name} holds {value} at {place}: weights must be finite numbers, download the model anew")


def _all_finite(tensor: torch.Tensor) -> bool:
    """By the bits: read as integers, those of infinity and NaN are above all others', on either side of zero. NumPy
    passes twice over them, which is quicker than torch once, and takes no memory."""
    signed, unsigned = (torch.int16, np.uint16) if tensor.itemsize == 2 else (torch.int32, np.uint32)
    bits = tensor.view(signed).numpy()
    limits = torch.tensor([torch.inf, -torch.inf], dtype=tensor.dtype).view(signed).numpy()
    return bool(bits.max() < limits[0] and bits.view(unsigned).max() < limits[1].view(unsigned))


def clear_padding_rows(layout: TapeLayout, weights: torch.Tensor) -> None:
    """Write zeros into every packed row that holds no source row, and touch no other memory."""
    for matrix in layout.matrices:
        padding = np.flatnonzero(matrix.row_map < 0)
        if len(padding):
            block, row = padding // BLOCK_ROWS, padding % BLOCK_ROWS
            if matrix.format.plain:
                _lines(_region(layout, matrix, weights))[block, row] = np.zeros((), _LINE)
            else:
                page_pieces(_pages(matrix, weights))[block, row // HALF_BLOCK, row % HALF_BLOCK] = 0


def pack_bias(matrix: Matrix, source: str, tensor: torch.Tensor, constants: torch.Tensor) -> None:
    """Write one bias [rows] of a matrix into the fp32 constants, in packed row order. Raises as `pack_weight` does."""
    check_finite(source, tensor, tensor)
    constants[matrix.bias_offset + torch.from_numpy(_packed_rows(matrix, source))] = tensor.float()


def pack_head_norm(layout: TapeLayout, matrix: Matrix, source: str, tensor: torch.Tensor, constants: torch.Tensor) -> None:
    """Write the norm weights of a query or a key head [head_dim], or of all of them, into the fp32 constants, in packed row
    order. Raises as `pack_weight` does."""
    check_finite(source, tensor, tensor)
    constants[_head_norm_places(layout, matrix, source)] = tensor.float()


def unpack(layout: TapeLayout, weights: torch.Tensor, constants: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inverse of packing: every tensor by its Hugging Face name, plain matrices in the dtype of `weights`, others in fp32.
    A tied head that is quantised comes under the name that an untied one has."""
    tensors: dict[str, torch.Tensor] = {}
    for matrix in layout.matrices:
        region = None if isinstance(matrix.format, Packed) else _region(layout, matrix, weights)
        columns = torch.from_numpy(_packed_columns(matrix))
        for source in matrix.sources:
            rows = torch.from_numpy(_packed_rows(matrix, source))
            if region is None:
                name = f"{HEAD}.weight" if matrix.kind == "head" else source
                tensors[name] = quantised_rows(matrix, weights, constants)[rows][:, columns]
            else:
                tensors[source] = region[rows // BLOCK_ROWS, :, rows % BLOCK_ROWS].flatten(1)[:, columns]
        for source in matrix.bias_sources:
            tensors[source] = constants[matrix.bias_offset + torch.from_numpy(_packed_rows(matrix, source))]
        for source in matrix.head_norm_sources:
            tensors[source] = constants[_head_norm_places(layout, matrix, source)]
    for kind, layer in layout.norms():
        start = layout.norm_offset(kind, layer)
        tensors[layout.norm_source(kind, layer)] = constants[start : start + layout.config.hidden_size].clone()
    return tensors


def quantised_rows(matrix: Matrix, weights: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
    """All packed rows of a quantised matrix as numbers, fp32 [rows, packed columns]."""
    assert isinstance(matrix.format, Packed)
    return matrix.format.rows(_pages(matrix, weights), _beside(matrix, constants)).flatten(0, 1)


def _pages(matrix: Matrix, weights: torch.Tensor) -> torch.Tensor:
    """The pages of one matrix as a view [blocks, pages, page elements]."""
    pages = weights[matrix.first_page : matrix.first_page + matrix.pages]
    return pages.view(matrix.blocks, matrix.pages_per_block, -1)


def _beside(matrix: Matrix, constants: torch.Tensor) -> torch.Tensor:
    """What lies beside the pages of a quantised matrix as a view [blocks, pages, words]."""
    count = matrix.pages * matrix.format.scale_words
    words = constants[matrix.scale_offset : matrix.scale_offset + count]
    return words.view(matrix.blocks, matrix.pages_per_block, -1)


def _region(layout: TapeLayout, matrix: Matrix, weights: torch.Tensor) -> torch.Tensor:
    """The pages of one matrix as a view [blocks, tiles along K, 16 rows, tile_columns]."""
    pages = weights[matrix.first_page : matrix.first_page + matrix.pages]
    return pages.view(matrix.blocks, matrix.pages_per_block * TILES_PER_PAGE, BLOCK_ROWS, layout.tile_columns)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, the last axis in bytes; NumPy has no bfloat16."""
    return tensor.view(torch.uint8).numpy()


def _lines(region: torch.Tensor) -> np.ndarray:
    """A region as tile rows in the order in which a packed row needs them: [blocks, 16 rows, tiles along K] of 128
    bytes."""
    return _bytes(region).view(_LINE)[..., 0].transpose(0, 2, 1)


def _packed_rows(matrix: Matrix, source: str) -> np.ndarray:
    """The packed row of each row of one source: int64 [source rows]."""
    return _inverse(matrix.row_map)[matrix.source_slice(source)]


def _head_norm_places(layout: TapeLayout, matrix: Matrix, source: str) -> torch.Tensor:
    """Where each weight of a norm of heads lies in the constants: int64 [heads that it has weights for * head_dim]."""
    number, size = matrix.head_norm_sources.index(source), layout.config.padded_head_dim
    heads = sum(matrix.head_norm_heads[:number]) + torch.arange(matrix.head_norm_heads[number])
    within = torch.from_numpy(_inverse(paired_head_rows(layout.config.head_dim)))
    return (matrix.head_norm_offset + heads[:, None] * size + within).flatten()


def _packed_columns(matrix: Matrix) -> np.ndarray:
    """The packed column of each source column: int64 [source columns]."""
    return np.arange(matrix.columns) if matrix.column_map is None else _inverse(matrix.column_map)


def _inverse(index_map: np.ndarray) -> np.ndarray:
    """Where each source index stands in a map that holds every one exactly once."""
    packed = np.flatnonzero(index_map >= 0)
    inverse = np.empty(len(packed), dtype=np.int64)
    inverse[index_map[packed]] = packed
    return inverse


def _pad_columns(matrix: Matrix, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, K] spread to packed columns and padded with zeros to whole pages, contiguous."""
    width = matrix.pages_per_block * matrix.format.columns
    if matrix.column_map is None and rows.shape[1] == width:
        return rows.contiguous()
    padded = torch.zeros(len(rows), width, dtype=rows.dtype)
    if matrix.column_map is None:
        padded[:, : rows.shape[1]] = rows
        return padded
    padded[:, torch.from_numpy(_packed_columns(matrix))] = rows
    return padded
