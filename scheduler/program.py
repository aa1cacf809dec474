"""The serialised program: NumPy arrays that the CPU machine, the checker and the kernel all read.

It stands alone: with the packed weights, nothing else is needed to run it.  Saved as one `.npz` file with a version header;
nothing in it is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from instructions.codec import INT32_MAX, MAX_SIGNALS, MAX_WAITS, NONE, WORDS, Scheduled, Word, decode, disassemble
from instructions.sample import Sample
from instructions.shape import Shape
from models.config import ModelConfig
from models.errors import UserError
from models.formats import PLAIN, Formats, check_formats
from models.output import write_file
from scheduler.errors import ProgramFormatError
from scheduler.npz import open_arrays

MAGIC = "megakernel-program"
VERSION = 5
ARRAYS = ("words", "starts", "targets", "uses")
MOST_HEADER, MOST_TEXT = 64 * 1024, 200  # bytes, characters
MOST_BYTES = 64 * 1024 * 1024  # of an array: half a million instructions, some fifty times those of a large model


@dataclass(frozen=True, eq=False)
class Program:
    """Queues, counters and page plan of one decode token.

    words    int32 [instructions, WORDS]: the queues one after another, SM by SM; records as in `instructions.codec`
    starts   int32 [sms + 1]: SM s runs records starts[s] to starts[s + 1]
    targets  int32 [counters]: signals each counter gets in one token
    uses     int32 [sms]: page uses of each SM in one token
    ring     pages of the shared-memory ring

    The arrays lie in memory in the order of their indices, so that what is read by index (and proven) is what the kernel
    reads; those given in another order are copied.
    """

    shape: Shape
    policy: str
    ring: int
    words: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    uses: np.ndarray

    def __post_init__(self) -> None:
        for name in ARRAYS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), order="C"))

    @property
    def sms(self) -> int:
        """Number of SMs, one thread block each."""
        return len(self.starts) - 1

    @property
    def counters(self) -> int:
        """Number of counters."""
        return len(self.targets)

    def queue(self, sm: int) -> np.ndarray:
        """The records of one SM, int32 [n, WORDS]."""
        return self.words[self.starts[sm] : self.starts[sm + 1]]

    @cached_property
    def sm(self) -> np.ndarray:
        """The SM of each record, int64 [instructions]."""
        return np.repeat(np.arange(self.sms), np.diff(self.starts))

    @cached_property
    def decoded(self) -> list[list[Scheduled]]:
        """Every queue, decoded."""
        return [[decode(record) for record in self.queue(sm)] for sm in range(self.sms)]

    @cached_property
    def hints(self) -> np.ndarray:
        """Which waits order nothing, bool [instructions, MAX_WAITS]: for this token's signals, none of which releases.

        They say when it is worth while to look for values that announce themselves (docs/proof.md).
        """
        words = self.words
        sent = words[words[:, Word.RELEASE] != 0, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS]
        releases = np.zeros(self.counters, dtype=bool)
        releases[sent[sent != NONE]] = True
        place = np.arange(MAX_WAITS)
        counters = words[:, Word.WAIT : Word.WAIT + MAX_WAITS]
        known = (place < words[:, Word.WAITS, None]) & (words[:, Word.LAGS, None] >> place & 1 == 0)
        hints: np.ndarray = known & ~releases[np.where(known, counters, 0)]
        return hints

    @cached_property
    def end_counter(self) -> int:
        """The counter of the token's end, by which every SM opens the next: what `Sample` signals; NONE where nothing does."""
        samples = self.words[self.words[:, Word.OPCODE] == Sample.OPCODE]
        return int(samples[0, Word.SIGNAL]) if len(samples) else NONE

    def require_positions(self, position: int, tokens: int, capacity: int) -> None:
        """Raises ValueError where a launch does not fit: the page plan has no uses for more KV pages than the bucket's.

        `tokens` of one sequence, from `position` on.
        """
        limit = min(self.shape.bucket, self.shape.capacity - 1, capacity - 1)
        if tokens < 1 or position < 0 or position + tokens - 1 > limit:
            raise ValueError(f"{tokens} tokens from position {position}: this program decodes positions up to {limit}")

    def disassembly(self) -> Iterator[str]:
        """The program as text, one line an instruction."""
        for sm, queue in enumerate(self.decoded):
            for index, item in enumerate(queue):
                yield f"sm {sm:<3} #{index:<3} {disassemble(item)}"

    def header(self) -> dict[str, object]:
        """What is saved beside the arrays."""
        return {
            "magic": MAGIC,
            "version": VERSION,
            "config": self.shape.config.to_dict(),
            "itemsize": self.shape.itemsize,
            "capacity": self.shape.capacity,
            "bucket": self.shape.bucket,
            "slices": self.shape.slices,
            "tail": self.shape.tail,
            "formats": list(self.shape.formats),
            "sequences": self.shape.sequences,
            "depth": self.shape.depth,
            "policy": self.policy,
            "ring": self.ring,
        }

    def save(self, path: Path) -> None:
        """Write the program to a file, all of it or nothing."""
        save_arrays(path, self.header(), {name: getattr(self, name) for name in ARRAYS})


def save_arrays(path: Path, header: dict[str, object], arrays: dict[str, np.ndarray]) -> None:
    """Write arrays and a header of JSON to one file, all of it or nothing."""
    content = BytesIO()
    members: dict[str, Any] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays}
    np.savez_compressed(content, **members)
    write_file(path, content.getvalue())


def read_program(path: Path) -> Program:
    """Read a saved program, unproven: what may be run comes from `scheduler.build.load_program`.

    Raises ProgramFormatError for a file that is none, is damaged, or has another version.
    """
    try:
        with open_arrays(path) as file:
            header = json.loads(file.array("header", MOST_HEADER).tobytes())
            arrays = {name: file.array(name, MOST_BYTES) for name in ARRAYS}
    except FileNotFoundError:
        raise ProgramFormatError(f"{path}: no such program file; make one with `python -m scheduler`") from None
    except Exception as error:  # damage surfaces as nearly anything: zipfile, zlib, struct, JSON and NumPy each have their own
        raise ProgramFormatError(f"{path}: not a saved program or damaged ({error}); make it again") from None
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise ProgramFormatError(f"{path}: not a saved program; make one with `python -m scheduler`")
    if header.get("version") != VERSION:
        raise ProgramFormatError(f"{path}: program version {header.get('version')}, this is {VERSION}; make it again")
    if not arrays_fit(arrays):
        raise ProgramFormatError(f"{path}: arrays of the wrong type or size; make the program again")
    try:
        config = ModelConfig.from_dict(header["config"])
        numbers = {
            name: whole_number(header, name) for name in ("itemsize", "capacity", "bucket", "slices", "sequences", "depth")
        }
        shape = Shape(config, **numbers, tail=flag(header, "tail"), formats=formats_of(header))
        return Program(shape, text(header, "policy"), whole_number(header, "ring"), **arrays)
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError) as error:
        raise ProgramFormatError(f"{path}: damaged header ({error}); make the program again") from None


def whole_number(header: dict[str, Any], name: str) -> int:
    """A number of the header, which like all numbers of a program fits 32 bits."""
    value = header[name]
    if type(value) is not int or not 0 <= value <= INT32_MAX:
        raise ValueError(f"{name} is no whole number from 0 to {INT32_MAX}")
    return value


def flag(header: dict[str, Any], name: str) -> bool:
    """A yes or no of the header."""
    value = header[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    return value


def formats_of(header: dict[str, Any]) -> Formats:
    """The formats of the weights."""
    names = header["formats"]
    if not isinstance(names, list) or len(names) != len(PLAIN) or not all(isinstance(name, str) for name in names):
        raise ValueError("formats are no names of a body and a head")
    check_formats(Formats(*names), whole_number(header, "itemsize"))
    return Formats(*names)


def text(header: dict[str, Any], name: str) -> str:
    """A line of the header, fit to be shown."""
    value = header[name]
    if not isinstance(value, str) or not value.isprintable() or len(value) > MOST_TEXT:
        raise ValueError(f"{name} is no line of text")
    return value


def arrays_fit(arrays: dict[str, np.ndarray]) -> bool:
    """Whether the types and sizes of a program's arrays can belong together."""
    words, starts = arrays["words"], arrays["starts"]
    good = all(array.dtype == np.int32 for array in arrays.values())
    good = good and words.ndim == 2 and words.shape[1] == WORDS
    good = good and all(arrays[name].ndim == 1 for name in ("starts", "targets", "uses"))
    good = good and len(starts) >= 2 and len(arrays["uses"]) == len(starts) - 1
    good = good and starts[0] == 0 and starts[-1] == len(words) and bool(np.all(np.diff(starts) >= 0))
    return good
