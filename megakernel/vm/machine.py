"""What an executing instruction sees of the machine; it holds every instruction to the regions that it declared."""

from __future__ import annotations

import torch

from instructions.base import Region, SamplingState
from instructions.shape import ANNOUNCED, Shape
from megakernel.vm.errors import Fault
from megakernel.vm.memory import Activations
from megakernel.vm.record import Record
from megakernel.vm.sight import Clock, Moment, Sight
from megakernel.vm.state import DecodeState
from models.packed import PackedModel
from models.tape import BLOCK_ROWS, TILES_PER_PAGE


def covered(region: Region, declared: tuple[Region, ...]) -> bool:
    """Whether a region lies within one of those declared."""
    return any(
        other.buffer == region.buffer
        and other.layer == region.layer
        and other.start <= region.start
        and region.stop <= other.stop
        for other in declared
    )


class ExecutingMachine:
    """Implements `instructions.base.Machine` for one consumer; `begin` and `end` bracket each instruction."""

    def __init__(self, shape: Shape, model: PackedModel, memory: Activations, state: DecodeState, sight: Sight) -> None:
        self.shape, self.model, self.memory, self.state, self.sight = shape, model, memory, state, sight
        self.clock, self.moment = sight.nothing, Moment(0, 0)
        self.past = 0
        self.epoch = 0
        self.rows_left = 0
        self.declared_reads: tuple[Region, ...] = ()
        self.declared_writes: tuple[Region, ...] = ()

    def begin(self, record: Record, epoch: int, past: int, clock: Clock, moment: Moment) -> None:
        """The next instruction, for the token at position `past`, with what its SM can see."""
        self.past, self.epoch = past, epoch
        self.clock, self.moment = clock, moment
        self.declared_reads, self.declared_writes = record.reads, record.writes
        self.rows_left = sum(region.stop - region.start for region in record.writes)

    def end(self) -> None:
        """The instruction has ended; all it declared must be written."""
        if self.rows_left:
            raise Fault(f"ended with {self.rows_left} of its declared rows unwritten")

    def read(self, region: Region) -> torch.Tensor:
        if not covered(region, self.declared_reads):
            raise Fault(f"reads {region}, which it does not declare")
        if region.buffer == "token":
            return torch.tensor([float(self.state.token(self.past))])
        if region.buffer not in ANNOUNCED:
            self.sight.activations.check((self.memory.span(region),), self.clock, f"reads {region}")
        return self.memory.read(region, self.epoch)

    def write(self, region: Region, values: torch.Tensor) -> None:
        if not covered(region, self.declared_writes):
            raise Fault(f"writes {region}, which it does not declare")
        if region.buffer == "kv":
            self.state.cache.write(region, values, self.past)
            self.sight.cache.note((self.past % 2, region.layer, slice(region.start, region.stop)), self.moment)
        else:
            self.memory.write(region, values, self.epoch)
            self.sight.activations.note((self.memory.span(region),), self.moment)
        self.rows_left -= region.stop - region.start

    def constants(self, start: int, count: int) -> torch.Tensor:
        if not (start >= 0 and start + count <= self.model.constants.numel()):
            raise Fault(f"reads constants {start} to {start + count} of {self.model.constants.numel()}")
        return self.model.constants[start : start + count]

    def rope(self) -> torch.Tensor:
        return self.model.rope[self.past]

    def embedding(self, token: int) -> torch.Tensor:
        matrix = self.shape.matrix("embedding")
        block, row = divmod(token, BLOCK_ROWS)
        first = matrix.first_page + block * matrix.pages_per_block
        tiles = self.model.weights[first : first + matrix.pages_per_block].view(
            matrix.pages_per_block * TILES_PER_PAGE, BLOCK_ROWS, self.shape.tile_columns
        )
        return tiles[:, row].flatten()[: self.shape.config.hidden_size].float()

    def hidden(self) -> torch.Tensor:
        if self.state.hidden is None:
            raise Fault("takes a hidden state, but none has been left")
        return self.state.hidden

    def token(self) -> int:
        return self.state.token(self.past)

    def sampling(self) -> SamplingState:
        return self.state.sampling

    def emit(self, token: int) -> None:
        if not covered(Region("token", 0, 0, 1), self.declared_writes):
            raise Fault("chooses a token, which it does not declare")
        self.state.emit(self.past, token)
        self.rows_left -= 1
