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
from megakernel.vm.step import Step
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
        self.past = self.cached = self.column = 0
        self.slices = shape.slices
        self.epoch = 0
        self.step: Step
        self.rows_left = 0
        self.declared_reads: tuple[Region, ...] = ()
        self.declared_writes: tuple[Region, ...] = ()

    def begin(self, record: Record, epoch: int, step: Step, clock: Clock, moment: Moment) -> None:
        """The next instruction, of a step, with what its SM can see."""
        self.step, self.epoch = step, epoch
        self.clock, self.moment = clock, moment
        self.declared_reads, self.declared_writes = record.reads, record.writes
        columns = len(record.item.instruction.columns(self.shape))
        self.rows_left = sum((region.stop - region.start) * self.times(region, columns) for region in record.writes)

    def times(self, region: Region, columns: int) -> int:
        """How often each of a region's rows is written by an instruction that computes so many columns."""
        if region.buffer == "kv":
            return self.shape.depth
        return columns if region.buffer == "token" or self.shape.buffers[region.buffer].column else 1

    def turn(self, column: int) -> None:
        """Go on with a column."""
        self.column = column
        sequence, self.past, self.cached = self.step.columns[column]
        self.slices = self.step.slices(sequence)

    def end(self) -> None:
        """The instruction has ended; all it declared must be written."""
        if self.rows_left:
            raise Fault(f"ended with {self.rows_left} of its declared rows unwritten")

    def read(self, region: Region) -> torch.Tensor:
        return self.read_column(region, self.column)

    def read_column(self, region: Region, column: int) -> torch.Tensor:
        if not covered(region, self.declared_reads):
            raise Fault(f"reads {region}, which it does not declare")
        if region.buffer == "token":
            return torch.tensor([float(self.token())])
        if region.buffer not in ANNOUNCED:
            self.sight.activations.check((self.memory.span(region, column),), self.clock, f"reads {region}")
        return self.memory.read(region, self.epoch, column)

    def write(self, region: Region, values: torch.Tensor) -> None:
        if not covered(region, self.declared_writes):
            raise Fault(f"writes {region}, which it does not declare")
        if region.buffer == "kv":
            if self.step.takes_part(self.step.columns[self.column].sequence):
                again = self.column > 0 and self.step.columns[self.column - 1] == self.step.columns[self.column]
                self.state.cache.write(region, values, self.past, again)
            self.sight.cache.note((self.epoch % 2, region.layer, slice(region.start, region.stop)), self.moment)
        else:
            self.memory.write(region, values, self.epoch, self.column)
            self.sight.activations.note((self.memory.span(region, self.column),), self.moment)
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
        return self.state.token(self.past) if self.shape.columns == 1 else self.step.tokens[self.column]

    def sampling(self) -> SamplingState:
        return self.state.sequences[self.step.columns[self.column].sequence].sampling

    def emit(self, token: int) -> None:
        if not covered(Region("token", 0, 0, 1), self.declared_writes):
            raise Fault("chooses a token, which it does not declare")
        self.step.choose(self.column, token)
        self.sight.token.note((slice(0, 1),), self.moment)
        self.rows_left -= 1
