"""A model ready to be loaded onto a device: the packed tape, the constants and the RoPE table, in host memory.

Knows nothing of devices, and nothing of where the tensors come from beyond that they come one at a time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from models.config import ModelConfig
from models.errors import UserError
from models.formats import PLAIN, Formats
from models.packing import check_finite, clear_padding_rows, pack_bias, pack_head_norm, pack_weight, unpack
from models.rope import rope_table
from models.tape import Matrix, TapeLayout
from models.weights import HEAD, WeightSource, checked_tensors

PACKED_DTYPES = (torch.bfloat16, torch.float32)
PACKERS = min(8, os.cpu_count() or 1)  # tensors that are packed at a time


@dataclass(frozen=True, eq=False)
class PackedModel:
    """Everything a decode step reads that does not change.

    weights: `dtype` [tape.pages, tape.page_elements]; constants: fp32 [tape.constant_count], norm weights and packed
    biases; rope: fp32 [capacity, padded_head_dim / 2, 2], cosine and sine.
    """

    config: ModelConfig
    dtype: torch.dtype
    tape: TapeLayout
    weights: torch.Tensor
    constants: torch.Tensor
    rope: torch.Tensor

    @property
    def capacity(self) -> int:
        """Positions that the RoPE table covers, the longest context in tokens."""
        return self.rope.shape[0]


def numbers(model: PackedModel) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """What a packed model computes with: a configuration, and every tensor by name, quantised ones widened to fp32. A tied head
    that is quantised is a tensor of its own, and the configuration one of an untied head."""
    tensors = unpack(model.tape, model.weights, model.constants)
    tied = model.config.tied_embeddings and HEAD not in tensors
    return replace(model.config, tied_embeddings=tied), tensors


def pack(
    source: WeightSource,
    config: ModelConfig,
    dtype: torch.dtype = torch.bfloat16,
    capacity: int | None = None,
    formats: Formats = PLAIN,
) -> PackedModel:
    """Pack a model for contexts of up to `capacity` tokens (the model's own limit when None), a few tensors at a time.

    Holds the packed model and a few source tensors at a time. Weights wider than `dtype` are rounded to nearest even (fp16
    to bf16 loses 3 bits of mantissa), or quantised as `formats` has it. Raises `UserError` for a dtype or capacity that
    cannot be, for a tensor missing, left over or misshapen, and for a value that is not finite as packed.
    """
    if dtype not in PACKED_DTYPES:
        raise UserError(f"weights cannot be packed as {dtype}: choose bfloat16 or float32")
    limit = config.max_position
    capacity = limit if capacity is None else capacity
    if not 1 <= capacity <= limit:
        raise UserError(f"a context of {capacity} tokens does not fit this model: choose 1 to {limit}")
    tape = TapeLayout.from_config(config, dtype.itemsize, formats)
    weights = torch.empty(tape.pages, tape.page_elements, dtype=dtype)  # takes memory only as tensors arrive
    constants = torch.zeros(tape.constant_count, dtype=torch.float32)
    _fill(source, tape, weights, constants)
    return PackedModel(config, dtype, tape, weights, constants, rope_table(config, capacity))


def _fill(source: WeightSource, tape: TapeLayout, weights: torch.Tensor, constants: torch.Tensor) -> None:
    clear_padding_rows(tape, weights)
    matrices: dict[str, list[Matrix]] = {}
    for matrix in tape.matrices:
        for name in (*matrix.sources, *matrix.bias_sources, *matrix.head_norm_sources):
            matrices.setdefault(name, []).append(matrix)
    norms = {tape.norm_source(kind, layer): tape.norm_offset(kind, layer) for kind, layer in tape.norms()}

    def place(name: str, tensor: torch.Tensor) -> None:
        if name in norms:
            check_finite(name, tensor, tensor)
            constants[norms[name] : norms[name] + len(tensor)] = tensor.float()
            return
        for matrix in matrices[name]:  # a tied embedding is in two where the head is quantised
            if name in matrix.sources:
                pack_weight(tape, matrix, name, tensor, weights, constants)
            elif name in matrix.head_norm_sources:
                pack_head_norm(tape, matrix, name, tensor, constants)
            else:
                pack_bias(matrix, name, tensor, constants)

    _each_apart(place, checked_tensors(source, tape.config))


def _each_apart(place: Callable[[str, torch.Tensor], None], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Place tensors, several at a time in threads: memory that nobody has written yet is slow to write.  Raises what the first
    of them raises, in their order, as one at a time would."""
    under_way: deque[Future[None]] = deque()
    with ThreadPoolExecutor(PACKERS, "pack") as pool:
        try:
            for name, tensor in tensors:
                under_way.append(pool.submit(place, name, tensor))
                if len(under_way) == PACKERS:
                    under_way[0].result()
                    under_way.popleft()
        finally:
            for earlier in under_way:  # than what the source may have raised
                earlier.result()
