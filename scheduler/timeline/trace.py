"""The common trace format: time stamps of every instruction of some consecutive tokens, whoever took them.

    stamps int64 [tokens, records, points]     records in the order of the program's words, points as in `Point`

Nanoseconds of one clock for all SMs.  0 means that a stamp was not taken.  FETCHED, READY and SIGNALLED must be there;
what else is missing is filled in from its neighbours, and `Trace.notes` says what that costs.  Knows neither how stamps are
taken nor what they are used for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np

from instructions.codec import MAX_SIGNALS, MAX_WAITS, NONE, Scheduled, Word
from instructions.sample import Sample
from models.errors import UserError
from scheduler.npz import open_arrays
from scheduler.program import ARRAYS, MOST_HEADER, Program, read_program, save_arrays, text, whole_number

MAGIC = "megakernel-trace"
SOURCES = ("simulated", "measured")  # they name files
MOST_STAMPS = 1024**3  # bytes: more than a thousand tokens of a model with ten thousand instructions


class Point(IntEnum):
    """What a stamp marks.  The LOAD points are the loader's; the two WAITED are durations, all others times."""

    FETCHED = 0  # the consumer turned to the record, which is in its registers
    READY = 1  # all its counters were met
    LANDED = 2  # its first page had landed, and the consumer went on with it
    COMPUTED = 3  # its last page was multiplied
    STORED = 4  # its rows were on their way to memory
    SIGNALLED = 5  # its signals were sent
    LOAD_BEGUN = 6  # the loader turned to the record
    LOAD_ENDED = 7  # its last copy was issued
    LOAD_WAITED = 8  # of that, time spent waiting for a page to be released
    STAGED = 9  # its activations were in place, before it waited for its first page
    PAGE_WAITED = 10  # time its consumer waited for pages to land, the first one included


CONSUMER = (Point.FETCHED, Point.READY, Point.STAGED, Point.LANDED, Point.COMPUTED, Point.STORED, Point.SIGNALLED)
REQUIRED = (Point.FETCHED, Point.READY, Point.SIGNALLED)
DURATIONS = (Point.LOAD_WAITED, Point.PAGE_WAITED)
TIMES = [point for point in Point if point not in DURATIONS]


class TraceError(UserError):
    """Stamps that cannot be those of the program, or a file that holds no trace."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Stamps of `tokens` consecutive tokens, every consumer point filled in, times from 0 on.

    stamps     int64 [tokens, records, len(Point)] nanoseconds; -1 for the LOAD points of a record without pages
    landings   int64 [tokens, page uses] nanoseconds, or None: when each page landed, SM by SM; 0 for a use without a page
    past       positions cached before the first token; each token adds `advance`
    source     "simulated" or "measured"; `machine` says on what
    given      points of which stamps were taken
    """

    program: Program
    past: int
    advance: int
    source: str
    machine: str
    stamps: np.ndarray
    landings: np.ndarray | None
    given: frozenset[Point]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.stamps)

    def position(self, token: int) -> int:
        """Positions cached before a token."""
        return self.past + token * self.advance

    def at(self, point: Point) -> np.ndarray:
        """One point of all instructions, int64 [tokens, records]."""
        found: np.ndarray = self.stamps[:, :, point]
        return found

    @cached_property
    def items(self) -> list[Scheduled]:
        """The decoded records, in the order of the words."""
        return [item for queue in self.program.decoded for item in queue]

    @cached_property
    def mnemonics(self) -> np.ndarray:
        """What kind of instruction each record is, str [records]."""
        return np.array([item.instruction.MNEMONIC for item in self.items])

    @property
    def sm(self) -> np.ndarray:
        """The SM of each record, int64 [records]."""
        return self.program.sm

    @cached_property
    def index(self) -> np.ndarray:
        """The place of each record in its queue, int64 [records]."""
        found: np.ndarray = np.arange(len(self.sm)) - self.program.starts[self.sm]
        return found

    @cached_property
    def waits(self) -> tuple[np.ndarray, np.ndarray]:
        """Counters that each record waits for, or NONE, and how many tokens back: int64 [records, MAX_WAITS] each."""
        words = self.program.words.astype(np.int64)
        counters = words[:, Word.WAIT : Word.WAIT + MAX_WAITS]
        lags = words[:, Word.LAGS, None] >> np.arange(MAX_WAITS) & 1
        return np.where(np.arange(MAX_WAITS) < words[:, Word.WAITS, None], counters, NONE), lags

    @cached_property
    def signals(self) -> np.ndarray:
        """Counters that each record signals, or NONE, int64 [records, MAX_SIGNALS]."""
        return self.program.words[:, Word.SIGNAL : Word.SIGNAL + MAX_SIGNALS].astype(np.int64)

    @cached_property
    def last(self) -> int:
        """The record that ends a token."""
        return next(i for i, item in enumerate(self.items) if isinstance(item.instruction, Sample))

    def end(self, token: int) -> int:
        """When a token ended: its sample was signalled."""
        return int(self.stamps[token, self.last, Point.SIGNALLED])

    def begin(self, token: int) -> int:
        """When a token began: the one before ended, or, for the first of the trace, the first SM turned to it."""
        return self.end(token - 1) if token else int(self.at(Point.FETCHED)[0].min())

    def step(self, token: int) -> int:
        """Nanoseconds of one token."""
        return self.end(token) - self.begin(token)

    @property
    def steady(self) -> range:
        """The tokens to look at: all but the first, which starts with an empty ring, unless it is the only one."""
        return range(min(1, self.tokens - 1), self.tokens)

    @property
    def notes(self) -> list[str]:
        """What the missing stamps mean for the tables, in words."""
        notes = []
        if Point.STAGED not in self.given:
            notes.append("no STAGED stamps: waiting for the first page counts as reading activations")
        if Point.PAGE_WAITED not in self.given:
            notes.append("no PAGE_WAITED stamps: waiting for later pages is estimated from the pace of the fastest")
        if Point.LOAD_ENDED not in self.given:
            notes.append("no stamps of the loaders: bandwidth is drawn as pages were consumed")
        return notes

    def save(self, path: Path) -> None:
        """Write program and stamps to one file, all of it or nothing."""
        header = self.program.header() | {
            "trace": {"magic": MAGIC} | {name: getattr(self, name) for name in ("past", "advance", "source", "machine")}
        }
        arrays = {name: getattr(self.program, name) for name in ARRAYS} | {"stamps": self.stamps}
        arrays["given"] = np.array(sorted(self.given), dtype=np.int64)
        if self.landings is not None:
            arrays["landings"] = self.landings
        save_arrays(path, header, arrays)


def load_trace(path: Path) -> Trace:
    """Read a saved trace; raises TraceError for a file that is none, ProgramFormatError where its program is damaged."""
    program = read_program(path)
    try:
        with open_arrays(path) as file:
            header = json.loads(file.array("header", MOST_HEADER).tobytes())["trace"]
            stamps = file.array("stamps", MOST_STAMPS)
            given = frozenset(Point(int(point)) for point in file.array("given", MOST_HEADER))
            landings = file.array("landings", MOST_STAMPS) if "landings" in file else None
        if header["magic"] != MAGIC or header["source"] not in SOURCES:
            raise ValueError("another format")
        numbers = whole_number(header, "past"), whole_number(header, "advance")
        trace = Trace(program, *numbers, header["source"], text(header, "machine"), stamps, landings, given)
        require_numbers(trace)
    except Exception as error:  # as in `read_program`
        raise TraceError(f"{path}: not a saved trace or damaged ({error}); trace again") from None
    check_stamps(trace)
    return trace


def require_numbers(trace: Trace) -> None:
    """Raise ValueError for arrays that are none of a trace."""
    arrays = [trace.stamps, *([] if trace.landings is None else [trace.landings])]
    if any(array.dtype != np.int64 or len(array.shape) != wide for array, wide in zip(arrays, (3, 2), strict=False)):
        raise ValueError("arrays of the wrong type")
    if not trace.tokens or trace.landings is not None and len(trace.landings) != trace.tokens:
        raise ValueError("arrays of the wrong size")


def from_stamps(
    program: Program,
    stamps: np.ndarray,
    *,
    past: int,
    machine: str,
    advance: int = 1,
    source: str = "measured",
    landings: np.ndarray | None = None,
) -> Trace:
    """A trace from stamps int64 [tokens, records, points], with `past` positions cached before the first token and
    `advance` more before each of the others.

    The last dimension may end early: trailing points were then not taken.  Tokens at the end without any stamp are left out.
    Raises TraceError where a stamp is missing or stamps contradict each other or the program.
    """
    stamps = np.asarray(stamps)
    if stamps.ndim != 3 or stamps.shape[1] != len(program.words) or not len(CONSUMER) - 1 <= stamps.shape[2] <= len(Point):
        raise TraceError(
            f"stamps of shape {list(stamps.shape)}: a program of {len(program.words)} instructions has [tokens, "
            f"{len(program.words)}, {len(CONSUMER) - 1} to {len(Point)} points]"
        )
    tokens = int(np.flatnonzero(stamps.any(axis=(1, 2))).max(initial=-1)) + 1
    if not tokens:
        raise TraceError("no stamp was taken: was the kernel compiled with its trace?")
    full = np.zeros((tokens, len(program.words), len(Point)), dtype=np.int64)
    full[:, :, : stamps.shape[2]] = stamps[:tokens]
    columns = [point for point in Point if point < stamps.shape[2]]
    given = frozenset(point for point in columns if point in DURATIONS or full[:, :, point].any())
    require_points(program, full)
    origin = full[:, :, TIMES][full[:, :, TIMES] > 0].min()
    full[:, :, TIMES] = np.where(full[:, :, TIMES] > 0, full[:, :, TIMES] - origin + 1, 0)  # 0 stays "not taken"
    fill_missing(full)
    full[:, :, TIMES] -= 1
    if landings is not None:
        landings = np.where(landings[:tokens] > 0, landings[:tokens] - origin, 0)
    trace = Trace(program, past, advance, source, machine, full, landings, given)
    check_stamps(trace)
    return trace


def require_points(program: Program, stamps: np.ndarray) -> None:
    """Raise TraceError where a stamp that cannot be filled in is missing."""
    missing = np.argwhere(stamps[:, :, REQUIRED] <= 0)
    if len(missing):
        token, i, place = missing[0].tolist()
        raise TraceError(f"{where(program, token, i)} has no {REQUIRED[place].name} stamp")


def where(program: Program, token: int, i: int) -> str:
    """A record in words."""
    sm = int(np.searchsorted(program.starts, i, side="right")) - 1
    return f"token {token}, sm {sm} #{i - int(program.starts[sm])}"


def fill_missing(stamps: np.ndarray) -> None:
    """Give every point that was not taken the time of a neighbour: an instruction without pages lands when it is ready."""
    for point, other in (
        (Point.STORED, Point.SIGNALLED),
        (Point.COMPUTED, Point.STORED),
        (Point.LANDED, Point.STAGED),
        (Point.LANDED, Point.READY),
        (Point.STAGED, Point.LANDED),
        (Point.LOAD_ENDED, Point.LOAD_BEGUN),
        (Point.LOAD_BEGUN, Point.LOAD_ENDED),
    ):
        taken = stamps[:, :, point] > 0
        stamps[:, :, point] = np.where(taken, stamps[:, :, point], stamps[:, :, other])


def first_fall(stamps: np.ndarray, points: Sequence[Point]) -> tuple[list[int], Point, Point] | None:
    """Where a point is earlier than the one before it: (token, record), and the two points."""
    for before, after in zip(points, points[1:], strict=False):
        wrong = np.argwhere(stamps[:, :, after] < stamps[:, :, before])
        if len(wrong):
            return wrong[0].tolist(), before, after
    return None


def check_stamps(trace: Trace) -> None:
    """Raise TraceError where an SM's own stamps go back in time: no clock does that, so they are not what they should be."""
    program, stamps = trace.program, trace.stamps
    if stamps.shape[1:] != (len(program.words), len(Point)):
        raise TraceError(f"stamps of shape {list(stamps.shape)} do not belong to this program")
    found = first_fall(stamps, CONSUMER) or first_fall(stamps, (Point.LOAD_BEGUN, Point.LOAD_ENDED))
    if found:
        (token, i), before, after = found
        raise TraceError(f"{where(program, token, i)}: {after.name} is earlier than {before.name}")
    follows = trace.index[1:] > 0
    late = (stamps[:, 1:, Point.FETCHED] < stamps[:, :-1, Point.SIGNALLED]) & follows
    if late.any():
        token, i = np.argwhere(late)[0].tolist()
        raise TraceError(f"{where(program, token, i + 1)} was fetched before the one before it had signalled")
