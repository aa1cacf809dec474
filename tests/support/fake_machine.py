"""The smallest machine that an instruction can run on: a dictionary of rows, made-up weights, no schedule, no ring.

It is strict where the protocol is: rows must have been set before they are read, page uses are asked for in order, at most
HELD_PAGES at once and each exactly once; an empty use is a page of NaN, so a value taken from one shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from instructions.base import GREEDY, Instruction, PageSource, Region, SamplingState
from instructions.matvec import DTYPES
from instructions.shape import HELD_PAGES, Shape
from models.packed import PackedModel, pack
from models.weights import Weights, expected_tensors
from tests.support.configs import small_config

CAPACITY = 256


def small_shape(name: str, itemsize: int = 2, slices: int = 1, tail: bool = False) -> Shape:
    """One of the models in `configs`, with a cache and a bucket of 256 positions (rounded up to whole pages)."""
    return Shape(small_config(name, CAPACITY), itemsize, CAPACITY, CAPACITY, slices, tail)


def made_up_tensors(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the model, in values that the weight type holds exactly, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_tensors(shape.config).items():
        scale = size[1] ** -0.5 if len(size) == 2 else 0.5
        values = torch.randn(size, generator=generator) * scale
        tensors[name] = (values + ("norm" in name)).to(DTYPES[shape.itemsize])
    return tensors


@dataclass
class FakeMachine:
    """See `instructions.base.Machine`.  `rows` holds fp32 values by (buffer, layer); `cache` the pages of the KV cache."""

    shape: Shape
    past: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: SamplingState = GREEDY
    current: int = 0
    left: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    emitted: list[int] = field(default_factory=list)

    column: int = 0
    slices: int = 0
    cached: int = 0

    def read_column(self, region: Region, column: int) -> torch.Tensor:
        return self.read(region)

    def __post_init__(self) -> None:
        self.slices, self.cached = self.shape.slices, self.past
        self.packed: PackedModel | None = None
        if self.tensors:
            self.packed = pack(Weights(self.tensors), self.shape.config, DTYPES[self.shape.itemsize], CAPACITY)
        self.rows = {
            (name, layer): torch.full((buffer.rows,), torch.nan)
            for name, buffer in self.shape.buffers.items()
            for layer in range(buffer.layers)
        }
        self.cache = torch.full(
            (self.shape.cache_pages, self.shape.page_elements), torch.nan, dtype=DTYPES[self.shape.itemsize]
        )

    @property
    def model(self) -> PackedModel:
        assert self.packed is not None, "this test gave the machine no weights"
        return self.packed

    def read(self, region: Region) -> torch.Tensor:
        values = self.rows[region.buffer, region.layer][region.start : region.stop]
        assert len(values) == region.stop - region.start, f"{region} lies outside its buffer"
        return values.clone()

    def write(self, region: Region, values: torch.Tensor) -> None:
        rows = self.rows[region.buffer, region.layer]
        assert values.dtype == torch.float32 and values.shape == rows[region.start : region.stop].shape
        rows[region.start : region.stop] = values

    def constants(self, start: int, count: int) -> torch.Tensor:
        return self.model.constants[start : start + count]

    def rope(self) -> torch.Tensor:
        return self.model.rope[self.past]

    def embedding(self, token: int) -> torch.Tensor:
        return self.tensors["model.embed_tokens.weight"][token].float()

    def hidden(self) -> torch.Tensor:
        return self.left

    def token(self) -> int:
        return self.current

    def sampling(self) -> SamplingState:
        return self.state

    def emit(self, token: int) -> None:
        self.emitted.append(token)

    def page(self, source: PageSource | None) -> torch.Tensor:
        """What the loader would have copied into a page use."""
        if source is None:
            return torch.full((self.shape.page_elements,), torch.nan, dtype=DTYPES[self.shape.itemsize])
        return (self.model.weights if source.space == "tape" else self.cache)[source.index]

    def run(self, instruction: Instruction) -> None:
        """Execute one instruction."""
        uses, taken = instruction.page_uses(self.shape), 0
        tape = instruction.tape_page(self.shape)
        steps = instruction.execute(self)
        try:
            request = next(steps)
            while True:
                assert request.first == taken, "page uses must be taken in order, each once"
                assert 1 <= request.count <= HELD_PAGES
                taken += request.count
                numbers = range(request.first, taken)
                sources = [instruction.page_source(self.shape, tape, use, self.past) for use in numbers]
                request = steps.send(torch.stack([self.page(source) for source in sources]))
        except StopIteration:
            assert taken == uses, f"{instruction} took {taken} of its {uses} page uses"
