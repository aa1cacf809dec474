"""Matrices in quantised formats outside the tape: as a checkpoint hands them over, and widened again for whoever multiplies
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from models.config import ModelConfig
from models.families import layer_of
from models.families.base import layer_module
from models.formats import PLAIN_NAME, Formats, Packed, format_of
from models.formats.base import Codes
from models.weights import EMBEDDING, HEAD, WeightSource

CHUNK_ELEMENTS = 2**22  # of a matrix at a time


@dataclass(frozen=True)
class Quantised:
    """A matrix [rows, K] in codes, which stands for the tensor of its numbers: rows of it are widened when they are taken.

    `codes` are those of whole groups; of the values only the first K columns count.
    """

    format: Packed
    codes: Codes
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """As a tensor's."""
        return len(self.codes.values), self.columns

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Of the codes, as they are in memory."""
        return sum(tensor.nbytes for tensor in self.codes.tensors() if tensor is not None)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """As a tensor's."""
        return math.prod(self.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.format.widen(self.part(rows))[:, : self.columns]

    def part(self, rows: slice) -> Codes:
        """The codes of some rows."""
        return self.codes.part(rows)

    def to(self, dtype: torch.dtype | None = None, copy: bool = False) -> torch.Tensor:
        """All numbers, in fp32 unless it is told otherwise."""
        return self[slice(None)].to(dtype or torch.float32)


def whole_pages(format: Packed, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, K] with zeros up to whole pages of columns."""
    return pad(rows, (0, -rows.shape[1] % format.columns))


def pages_of(format: Packed, codes: Codes) -> Codes:
    """Codes of whole groups as codes of whole pages; the groups that are added are zeros."""
    columns = -codes.values.shape[1] % format.columns
    groups = (codes.values.shape[1] + columns) // format.group - codes.scales.shape[1]
    return codes.padded(columns, groups)


def plain_matrices(config: ModelConfig) -> set[str]:
    """Matrices of layers that no format is for: those of routers."""
    linears = [linear for linear in layer_of(config).linears if linear.kind == "router"]
    names = [name for linear in linears for name in linear.rows(config)]
    return {f"{layer_module(layer, name)}.weight" for layer in range(config.num_layers) for name in names}


@dataclass(frozen=True)
class Requantised:
    """A `WeightSource` of what is left of another's matrices in quantised formats: numbers again, for a backend that multiplies
    those.  A tied head that is quantised comes as a tensor of its own (`config`)."""

    source: WeightSource
    config: ModelConfig
    formats: Formats

    def untied(self) -> ModelConfig:
        """The configuration of what it hands over."""
        return replace(self.config, tied_embeddings=self.config.tied_embeddings and self.formats.head == PLAIN_NAME)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`."""
        routers = plain_matrices(self.config)
        for name, tensor in self.source.tensors():
            if name == EMBEDDING:
                yield name, tensor
                if self.config.tied_embeddings and self.formats.head != PLAIN_NAME:
                    yield HEAD, self.rounded(self.formats.head, tensor)
            elif len(tensor.shape) == 2 and name not in routers:
                yield name, self.rounded(self.formats.head if name == HEAD else self.formats.body, tensor)
            else:
                yield name, tensor

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A matrix after it has been in a format."""
        format = format_of(name, 2)
        if not isinstance(format, Packed) or (isinstance(tensor, Quantised) and tensor.format is format):
            return tensor
        out = torch.empty(tuple(tensor.shape), dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // tensor.shape[1])
        for start in range(0, len(tensor), step):
            rows = tensor[start : start + step].float()
            out[start : start + step] = format.widen(format.quantise(whole_pages(format, rows)))[:, : rows.shape[1]]
        return out
