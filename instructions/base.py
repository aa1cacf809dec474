"""What every instruction has: fields and their ranges, the buffers it brings, the regions it touches, the pages it
streams, its cost, its meaning on the CPU.

An instruction is a frozen dataclass of small integers.  It knows nothing of where it runs, what it waits for, or in
which shared-memory page its weights land: the scheduler decides that, and `instructions.codec` writes both down.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar, NamedTuple, Protocol

import torch

from instructions.dimensions import Dimensions


@dataclass(frozen=True, order=True)
class Region:
    """Rows `start` (included) to `stop` (excluded) of one layer of a buffer, in all columns; `Shape.buffers` has all
    buffers."""

    buffer: str
    layer: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.buffer}[{self.layer}][{self.start}:{self.stop}]"


def every_layer(shape: Dimensions) -> int:
    """One layer of a buffer for each layer of the model."""
    return shape.config.num_layers


@dataclass(frozen=True)
class Activation:
    """A buffer of fp32 activations that an instruction brings: `layers(shape)` runs of `rows(shape)` values.

    `announced`: its values announce themselves, so its readers need not wait for a signal that releases.
    `sliced`: how many rows it has depends on the number of attention slices.
    `apart`: every column has rows with names of its own, one column's behind another's, since some writer has one column alone.
    """

    name: str
    rows: Callable[[Dimensions], int]
    layers: Callable[[Dimensions], int] = every_layer
    announced: bool = True
    sliced: bool = False
    apart: bool = False


class Cost(NamedTuple):
    """Bytes streamed from HBM and floating-point operations of one execution."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class PageRequest:
    """What an executing instruction yields: `count` page uses from its `first`, held together, then released."""

    first: int
    count: int


@dataclass(frozen=True)
class PageSource:
    """Where the loader finds a page: `space` is "tape" (weights) or "kv" (the cache), `index` counts pages in it."""

    space: str
    index: int


Pages = Generator[PageRequest, torch.Tensor, None]


class Machine(Protocol):
    """What an instruction may do while it executes, for one column.  All values are fp32 tensors of shape [rows] unless said
    otherwise.

    An instruction says what it means for one column; a machine runs it for each, all of them on the same pages.
    """

    column: int  # the one that is computed
    slices: int  # into which its sequence's context is split: as many as the program has, or fewer
    past: int  # positions before the token being decoded: its position
    cached: int  # and those of them that the KV cache holds; the others are those of the sequence's columns before this one

    @property
    def shape(self) -> Dimensions:
        """The sizes of the program that runs."""

    def read(self, region: Region) -> torch.Tensor:
        """The region's rows, of this token."""

    def read_column(self, region: Region, column: int) -> torch.Tensor:
        """The region's rows in another column."""

    def write(self, region: Region, values: torch.Tensor) -> None:
        """Store the region's rows; "kv" stores into the cache row of the current position, in the cache's dtype."""

    def constants(self, start: int, count: int) -> torch.Tensor:
        """Norm weights and biases, [count]."""

    def rope(self) -> torch.Tensor:
        """Cosine and sine of every pair of a head at the current position, [dp / 2, 2]."""

    def embedding(self, token: int) -> torch.Tensor:
        """One row of the embedding, [hidden]."""

    def hidden(self) -> torch.Tensor:
        """The residual stream that prefill left for the token being decoded, [hidden]."""

    def token(self) -> int:
        """The id of the token being decoded."""

    def sampling(self) -> SamplingState:
        """How the next token is to be chosen."""

    def emit(self, token: int) -> None:
        """Append the chosen token to the sequence and check it against the stop tokens."""


class SamplingState(NamedTuple):
    """Sampling parameters as the machine holds them: `top_k` 0 and `top_p` 1 are off, `temperature` 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    seed: int

    @property
    def cuts(self) -> bool:
        """Whether top_k or top_p may leave rows out."""
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0)


GREEDY = SamplingState(temperature=0.0, top_k=0, top_p=1.0, seed=0)


@dataclass(frozen=True)
class Instruction:
    """Base of all instructions.  Subclasses are frozen dataclasses whose fields are non-negative int32 numbers.

    `layer` is stored in a word of its own; every other field takes the next payload word, in the order declared.  The
    checker refuses an instruction that does not say whether it belongs to a layer, or what a field may hold.
    """

    OPCODE: ClassVar[int]  # 1 to 30: the kernel has sets of opcodes as bits of an int32
    MNEMONIC: ClassVar[str]
    LAYERED: ClassVar[bool | None] = None  # True: it belongs to a layer; False: to the token, and `layer` is 0
    SHORT: ClassVar[bool] = False  # it is short, or waits for short ones alone: HBM would idle meanwhile
    BRINGS: ClassVar[tuple[Activation, ...]] = ()  # the buffers that exist because of it

    layer: int

    @classmethod
    @cache
    def payload_names(cls) -> tuple[str, ...]:
        """Names of the fields that travel in payload words, in order."""
        return tuple(field.name for field in fields(cls) if field.name != "layer")

    @classmethod
    def foreign(cls, shape: Dimensions) -> str | None:
        """Why no instruction of this kind has a part in the model, or None; asked before anything else."""
        return None

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        """Smallest and largest value of every payload field, in a program for `sms` SMs; `layer` is in range."""
        return {}

    def misfit(self, shape: Dimensions) -> str | None:
        """Why fields that are each within their range fit no part of the model together, or None."""
        return None

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        """Regions the consumer reads, after this instruction's waits."""
        raise NotImplementedError

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        """Regions the consumer writes, before this instruction's signals."""
        raise NotImplementedError

    def loads(self, shape: Dimensions) -> tuple[Region, ...]:
        """Regions the loader streams ahead of the waits: rows of earlier positions of the KV cache."""
        return ()

    def selects(self, shape: Dimensions) -> tuple[Region, ...]:
        """Rows with the numbers of the experts whose pages it streams: the loader looks for them, of this token, before it
        does, and the consumer has its pages only then."""
        return ()

    def streams(self, shape: Dimensions) -> tuple[tuple[int, int], ...]:
        """Pages [first, stop) of the weight tape that it streams; of experts, as if they were chosen in the order of their
        numbers."""
        first, uses = self.tape_page(shape), self.page_uses(shape)
        return ((first, first + uses),) if uses and not self.loads(shape) else ()

    def page_uses(self, shape: Dimensions) -> int:
        """Pages of shared memory this instruction passes through the ring, the same number for every token."""
        return 0

    def tape_page(self, shape: Dimensions) -> int:
        """First page it streams, of the weight tape (of experts: if all that it streams were expert 0's) or (attention) of the
        KV cache."""
        return 0

    def page_source(self, shape: Dimensions, tape: int, use: int, past: int, chosen: Sequence[int] = ()) -> PageSource | None:
        """What page use number `use` holds when `past` positions are cached, and `chosen` stands in the rows that it selects
        by; None where the use passes through empty.  Where nothing is chosen yet, slot j holds expert j."""
        return PageSource("tape", tape + use)

    def columns(self, shape: Dimensions) -> range:
        """The columns that it computes."""
        return range(shape.columns)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        """Bytes and operations of one execution with `past` positions cached, whatever the columns."""
        raise NotImplementedError

    def execute(self, machine: Machine) -> Pages:
        """Run on the CPU, for one column: a generator that yields the pages it needs, in order, and receives them as
        tensors."""
        raise NotImplementedError
