"""A serialised record, decoded once and checked against the instruction that it claims to hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instructions.base import Region
from instructions.codec import Scheduled, decode, disassemble
from megakernel.vm.errors import VmError
from scheduler.program import Program


@dataclass(frozen=True, eq=False)
class Record:
    """Instruction number `index` of SM `sm`, with the regions it declares.

    `streams_tape`: its pages are of the weight tape, and consecutive for every token where it selects none; otherwise they are
    KV pages.
    """

    sm: int
    index: int
    item: Scheduled
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    selects: tuple[Region, ...]
    streams_tape: bool

    def error(self, problem: str) -> VmError:
        """A `VmError` that names this instruction."""
        return VmError(self.sm, self.index, disassemble(self.item), problem)


def decode_queue(program: Program, sm: int) -> list[Record]:
    """The queue of one SM; raises VmError for a record that is no instruction or that contradicts its instruction."""
    return [decode_record(program, sm, index, words) for index, words in enumerate(program.queue(sm))]


def decode_record(program: Program, sm: int, index: int, words: np.ndarray) -> Record:
    """One record.  Whatever a damaged record makes the instruction classes raise is reported as that record's fault."""
    text = " ".join(str(word) for word in words)
    try:
        item = decode(words)
        text = disassemble(item)
        instruction, shape = item.instruction, program.shape
        reads, writes, loads = instruction.reads(shape), instruction.writes(shape), instruction.loads(shape)
        selects = instruction.selects(shape)
        pages = instruction.page_uses(shape)
        tape = instruction.tape_page(shape) if pages else 0
    except Exception as error:  # any exception at all means that the words are no instruction of this model
        raise VmError(sm, index, text, f"not an instruction of this model: {error!r}") from error
    record = Record(sm, index, item, reads, writes, selects, not loads)
    if (item.pages, item.tape) != (pages, tape):
        raise record.error(f"streams pages {item.tape}+{item.pages}, the instruction needs {tape}+{pages}")
    waits = [*item.waits, *([] if item.load_wait is None else [item.load_wait])]
    for counter in [*(wait.counter for wait in waits), *item.signals]:
        if not 0 <= counter < program.counters:
            raise record.error(f"names counter {counter}; the program has {program.counters}")
    return record
