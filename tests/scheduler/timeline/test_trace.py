"""Stamps become a trace only if they can be those of the program; what was not stamped is filled in and said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megakernel.stamps import Point as KernelPoint
from models.errors import UserError
from scheduler.program import ARRAYS, save_arrays
from scheduler.timeline import Point, Trace, TraceError, load_trace
from scheduler.timeline.trace import CONSUMER
from tests.support.timeline_cases import ORIGIN, POSITION, measured, random_stamps, small_program, small_trace

NEEDED = (Point.FETCHED, Point.READY, Point.SIGNALLED)


def test_the_kernel_stamps_the_same_points() -> None:
    """The kernel may leave points out, but what it stamps lies where the trace expects it."""
    assert {point.name: int(point) for point in KernelPoint}.items() <= {point.name: int(point) for point in Point}.items()


def test_times_start_at_zero_and_keep_their_distances() -> None:
    program = small_program()
    stamps = random_stamps(program, 1)
    trace = measured(program, stamps)
    times = [point for point in Point if point not in (Point.LOAD_WAITED, Point.PAGE_WAITED)]
    assert trace.stamps[:, :, times].min() == 0
    shift = stamps[:, :, times].min()
    assert (trace.stamps[:, :, times] == stamps[:, :, times] - shift).all()
    assert (trace.at(Point.PAGE_WAITED) == stamps[:, :, Point.PAGE_WAITED]).all()


def test_trailing_points_and_tokens_may_be_missing() -> None:
    """A kernel may stamp no STAGED and no PAGE_WAITED, and a launch may end before its last token."""
    program = small_program()
    stamps = random_stamps(program, 2, tokens=3)
    short = stamps[:, :, : Point.STAGED].copy()
    short[2] = 0
    trace = measured(program, short)
    assert trace.tokens == 2
    assert (trace.at(Point.STAGED) == trace.at(Point.LANDED)).all()
    assert {Point.STAGED, Point.PAGE_WAITED}.isdisjoint(trace.given)
    assert len(trace.notes) == 2 and "STAGED" in trace.notes[0] and "PAGE_WAITED" in trace.notes[1]


def test_missing_points_take_a_neighbour() -> None:
    """Nothing landed: then it landed when its counters were met; nothing computed: until its rows were stored."""
    program = small_program()
    stamps = random_stamps(program, 3)
    for point in (Point.STAGED, Point.LANDED, Point.COMPUTED):
        stamps[0, 4, point] = 0
    trace = measured(program, stamps)
    assert trace.stamps[0, 4, Point.LANDED] == trace.stamps[0, 4, Point.STAGED] == trace.stamps[0, 4, Point.READY]
    assert trace.stamps[0, 4, Point.COMPUTED] == trace.stamps[0, 4, Point.STORED]
    stamps[1, 5, [Point.LOAD_BEGUN, Point.LOAD_ENDED]] = 0
    assert measured(program, stamps).stamps[1, 5, Point.LOAD_BEGUN] == -1


@pytest.mark.parametrize("point", NEEDED)
def test_a_stamp_that_cannot_be_guessed_is_asked_for(point: Point) -> None:
    program = small_program()
    stamps = random_stamps(program, 4)
    stamps[1, 7, point] = 0
    sm = int(np.searchsorted(program.starts, 7, side="right")) - 1
    with pytest.raises(TraceError, match=f"token 1, sm {sm} #{7 - program.starts[sm]} has no {point.name} stamp"):
        measured(program, stamps)


@pytest.mark.parametrize("place", range(1, len(CONSUMER)))
def test_a_clock_that_goes_back_is_refused(place: int) -> None:
    program = small_program()
    stamps = random_stamps(program, 5)
    stamps[0, 3, CONSUMER[place - 1]] = stamps[0, 3, CONSUMER[place]] + 1
    with pytest.raises(TraceError, match="is earlier than|was fetched before"):
        measured(program, stamps)


def test_an_instruction_that_overlaps_the_one_before_is_refused() -> None:
    program = small_program()
    stamps = random_stamps(program, 6)
    second = int(program.starts[0]) + 1
    stamps[0, second, Point.FETCHED] = stamps[0, second - 1, Point.SIGNALLED] - 1
    with pytest.raises(TraceError, match="sm 0 #1 was fetched before the one before it had signalled"):
        measured(program, stamps)


@pytest.mark.parametrize("shape", [(1, 3, 9), (1, 9), (1, 0, 12), (1, 0, 5)])
def test_stamps_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    program = small_program()
    full = tuple(len(program.words) if size == 0 else size for size in shape)
    with pytest.raises(TraceError, match="stamps of shape"):
        measured(program, np.full(full, ORIGIN))


def test_no_stamps_at_all() -> None:
    program = small_program()
    with pytest.raises(TraceError, match="no stamp was taken: was the kernel compiled with its trace"):
        measured(program, np.zeros((2, len(program.words), 9), dtype=np.int64))


def same(one: Trace, two: Trace) -> bool:
    """Whether two traces hold the same."""
    fields = all(getattr(one, name) == getattr(two, name) for name in ("past", "advance", "source", "machine", "given"))
    landings = (one.landings is None) == (two.landings is None)
    if one.landings is not None and two.landings is not None:
        landings = np.array_equal(one.landings, two.landings)
    return (
        fields and landings and np.array_equal(one.stamps, two.stamps) and np.array_equal(one.program.words, two.program.words)
    )


@pytest.mark.parametrize("kind", ["simulated", "measured"])
def test_a_saved_trace_comes_back(tmp_path: Path, kind: str) -> None:
    trace = small_trace() if kind == "simulated" else measured(small_program(), random_stamps(small_program(), 7))
    trace.save(tmp_path / "trace.npz")
    loaded = load_trace(tmp_path / "trace.npz")
    assert same(trace, loaded)
    assert loaded.position(1) == (POSITION if kind == "simulated" else POSITION + 1)


def test_files_that_hold_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    small_program().save(path)
    with pytest.raises(TraceError, match="not a saved trace"):
        load_trace(path)
    path.write_bytes(b"not even a zip file")
    with pytest.raises(UserError, match="file.npz"):
        load_trace(path)
    with pytest.raises(UserError, match="no such"):
        load_trace(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source": "../../elsewhere"}, "another format"),  # it names the files that are drawn
        ({"machine": "\x1b[2J"}, "machine"),
        ({"past": -1}, "past"),
        ({"advance": float("inf")}, "advance"),
    ],
)
def test_headers_that_no_trace_has(tmp_path: Path, change: dict[str, object], named: str) -> None:
    trace = small_trace()
    about = {"magic": "megakernel-trace", "past": 0, "advance": 1, "source": "measured", "machine": "m"}
    arrays = {name: getattr(trace.program, name) for name in ARRAYS}
    arrays |= {"stamps": trace.stamps, "given": np.array(sorted(trace.given), dtype=np.int64)}
    save_arrays(tmp_path / "good.npz", trace.program.header() | {"trace": about}, arrays)
    load_trace(tmp_path / "good.npz")
    save_arrays(tmp_path / "bad.npz", trace.program.header() | {"trace": about | change}, arrays)
    with pytest.raises(TraceError, match=f"not a saved trace or damaged .*{named}"):
        load_trace(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ("stamps", np.zeros(3)),
        ("stamps", np.zeros((0, 0, 0), dtype=np.int64)),
        ("stamps", np.array([[["a"]]])),
        ("landings", np.zeros(3)),
        ("landings", np.zeros((99, 1), dtype=np.int64)),
        ("given", np.array([99])),
        ("given", np.array(["a"])),
    ],
)
def test_arrays_that_no_trace_has(tmp_path: Path, changed: str, wrong: np.ndarray) -> None:
    trace = small_trace()
    trace.save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "bad.npz", **(arrays | {changed: wrong}))
    with pytest.raises(TraceError, match="bad.npz"):
        load_trace(tmp_path / "bad.npz")
