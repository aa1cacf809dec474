"""The program as the checker sees it: decoded afresh from its words, every record with its place and its regions.

Nothing is taken from the objects that produced the words.  Words must be the one encoding of what they decode to, so
that no reader of the format can understand them otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from instructions.base import Region
from instructions.codec import MAX_SIGNALS, MAX_WAITS, NONE, WORDS, CodecError, Scheduled, Word, decode, disassemble
from instructions.registry import BY_OPCODE
from instructions.shape import Shape
from scheduler.check.findings import Finding
from scheduler.limits import MAX_SMS

if TYPE_CHECKING:
    from scheduler.program import Program


@dataclass(frozen=True, eq=False)
class Listing:
    """Record i stands in queue `sm[i]` at place `index[i]`; records are numbered SM by SM."""

    shape: Shape
    ring: int
    items: list[Scheduled]
    sm: np.ndarray  # int32 [instructions]
    index: np.ndarray  # int32 [instructions]
    starts: np.ndarray  # int32 [sms + 1]
    targets: np.ndarray  # int32 [counters]
    uses: np.ndarray  # int32 [sms]
    texts: dict[int, str] = field(default_factory=dict)

    @property
    def sms(self) -> int:
        """Number of queues."""
        return len(self.starts) - 1

    @cached_property
    def reads(self) -> list[tuple[Region, ...]]:
        """What each consumer reads."""
        return [item.instruction.reads(self.shape) for item in self.items]

    @cached_property
    def writes(self) -> list[tuple[Region, ...]]:
        """What each consumer writes."""
        return [item.instruction.writes(self.shape) for item in self.items]

    @cached_property
    def loads(self) -> list[tuple[Region, ...]]:
        """What each loader streams besides weights."""
        return [item.instruction.loads(self.shape) for item in self.items]

    @cached_property
    def selects(self) -> list[tuple[Region, ...]]:
        """The choices by which each loader finds its pages."""
        return [item.instruction.selects(self.shape) for item in self.items]

    @cached_property
    def choosers(self) -> list[list[int]]:
        """The records that write them."""
        chosen = {(region.buffer, region.layer) for regions in self.selects for region in regions}
        writers: dict[tuple[str, int], list[tuple[Region, int]]] = {key: [] for key in chosen}
        for i, regions in enumerate(self.writes):
            for region in regions:
                if (region.buffer, region.layer) in chosen:
                    writers[region.buffer, region.layer].append((region, i))
        return [
            [i for region in regions for other, i in writers[region.buffer, region.layer] if meet(region, other)]
            for regions in self.selects
        ]

    @cached_property
    def producers(self) -> list[list[int]]:
        """The records that signal each counter."""
        found: list[list[int]] = [[] for _ in self.targets]
        for i, item in enumerate(self.items):
            for counter in item.signals:
                found[counter].append(i)
        return found

    def text(self, i: int) -> str:
        """Record i, disassembled."""
        return self.texts.setdefault(i, " ".join(disassemble(self.items[i]).split()))

    def place(self, i: int) -> str:
        """Record i with its place, for use within a message."""
        return f"sm {self.sm[i]} #{self.index[i]} [{self.text(i)}]"

    def finding(self, kind: str, i: int, message: str, details: tuple[str, ...] = ()) -> Finding:
        """A fault of record i."""
        return Finding(kind, message, int(self.sm[i]), int(self.index[i]), self.text(i), details)


def meet(a: Region, b: Region) -> bool:
    """Whether two regions of one layer of a buffer have rows in common."""
    return a.start < b.stop and b.start < a.stop


def array_findings(program: Program) -> list[Finding]:
    """Arrays that cannot belong together; nothing else can be asked of such a program."""
    arrays = (program.words, program.starts, program.targets, program.uses)
    if any(array.dtype != np.int32 for array in arrays):
        return [Finding("record", "words, starts, targets and uses must be int32 arrays")]
    if [array.ndim for array in arrays] != [2, 1, 1, 1] or program.words.shape[1] != WORDS:
        return [Finding("record", f"words must be [instructions, {WORDS}]; starts, targets and uses have one dimension")]
    if not all(array.flags.c_contiguous for array in arrays):
        return [Finding("record", "arrays must lie in memory in the order of their indices: the kernel reads memory")]
    sms = len(program.starts) - 1
    if not 1 <= sms <= MAX_SMS:
        return [Finding("limits", f"a grid of {sms} thread blocks; a program has 1 to {MAX_SMS}, one for each SM")]
    if len(program.uses) != sms:
        return [Finding("record", f"page uses of {len(program.uses)} SMs for {sms} queues")]
    most = MAX_SIGNALS * len(program.words)
    if len(program.targets) > most:
        return [Finding("counter", f"{len(program.targets)} counters; {len(program.words)} records can signal {most} at most")]
    if program.starts[0] != 0 or program.starts[-1] != len(program.words) or np.any(np.diff(program.starts) < 0):
        return [Finding("record", f"starts must rise from 0 to the {len(program.words)} records")]
    return []


def neutral(words: np.ndarray) -> np.ndarray:
    """The same records with every word that means nothing set as `encode` sets it, int32 [instructions, WORDS].

    Opcodes and numbers of waits must be valid.
    """
    tidy = words.copy()
    unused = np.arange(MAX_WAITS) >= words[:, Word.WAITS, None]
    tidy[:, Word.WAIT : Word.WAIT + MAX_WAITS][unused] = NONE
    tidy[:, Word.TARGET : Word.TARGET + MAX_WAITS][unused] = 0
    tidy[:, Word.LAGS] &= (1 << words[:, Word.WAITS]) - 1
    tidy[words[:, Word.LOAD_WAIT] == NONE, Word.LOAD_TARGET] = 0
    signals = words[:, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS]
    used_first = np.argsort(signals == NONE, axis=1, kind="stable")
    tidy[:, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS] = np.take_along_axis(signals, used_first, axis=1)
    fields = {opcode: len(kind.payload_names()) for opcode, kind in BY_OPCODE.items()}
    for opcode in np.unique(words[:, Word.OPCODE]):
        tidy[words[:, Word.OPCODE] == opcode, Word.PAYLOAD + fields[int(opcode)] :] = 0
    return tidy


def read_listing(program: Program) -> tuple[Listing | None, list[Finding]]:
    """Decode the words; findings where a record is no instruction, or not encoded as `encode` does."""
    findings = array_findings(program)
    if findings:
        return None, findings
    words, lengths = program.words, np.diff(program.starts)
    sm = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    index = np.arange(len(sm), dtype=np.int32) - program.starts[sm]
    items = []
    for i, record in enumerate(words.tolist()):
        try:
            items.append(decode(record))
        except CodecError as error:
            findings.append(Finding("record", f"sm {sm[i]} #{index[i]}: {error}"))
    if findings:
        return None, findings
    tidy = neutral(words)
    for i in np.flatnonzero((tidy != words).any(axis=1)).tolist():
        word = int(np.flatnonzero(tidy[i] != words[i])[0])
        name = Word(max(known for known in Word if known <= word)).name
        message = f"word {word} ({name}) is {words[i, word]}; there it means nothing, so it must be {tidy[i, word]}"
        findings.append(Finding("record", message, int(sm[i]), int(index[i]), disassemble(items[i])))
    arrays = (program.starts, program.targets, program.uses)
    return Listing(program.shape, program.ring, items, sm, index, *arrays), findings
