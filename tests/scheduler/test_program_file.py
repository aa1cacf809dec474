"""A program survives being saved and loaded, and a file that is none, or is damaged, is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import UserError
from scheduler.build import load_program
from scheduler.check import check
from scheduler.program import ARRAYS, MAGIC, VERSION, Program, read_program
from tests.support.program_cases import preset_program, programs, small_program


def same(one: Program, other: Program) -> bool:
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
    return equal and (one.shape, one.policy, one.ring) == (other.shape, other.policy, other.ring)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs())
def test_round_trip(tmp_path: Path, program: Program) -> None:
    path = tmp_path / "program.npz"
    program.save(path)
    loaded = load_program(path)
    assert same(loaded, program)
    assert all(getattr(loaded, name).dtype == np.int32 for name in ARRAYS)
    assert list(tmp_path.iterdir()) == [path], "a partial file is left behind"


def test_round_trip_of_a_preset(tmp_path: Path) -> None:
    program = preset_program("llama-3.2-1b")
    program.save(tmp_path / "1b.npz")
    assert same(read_program(tmp_path / "1b.npz"), program)
    assert (tmp_path / "1b.npz").stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("program") / "good.npz"
    small_program("gqa2", 3).save(path)
    return path.read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_program(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    message = refusal(path)
    assert str(path) in message
    return message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such program file" in refusal(tmp_path / "none.npz")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file(tmp_path: Path, saved: bytes, part: float) -> None:
    assert "make it again" in refused(tmp_path / "cut.npz", saved[: int(part * len(saved))])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_byte_is_refused_or_does_no_harm(tmp_path: Path, saved: bytes, data: st.DataObject) -> None:
    """Every member is checksummed; what is not (a time stamp, say) may change unnoticed, but never the program."""
    place = data.draw(st.integers(0, len(saved) - 1))
    damaged = bytearray(saved)
    damaged[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "flipped.npz"
    path.write_bytes(damaged)
    try:
        program = read_program(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert same(program, small_program("gqa2", 3))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04N."])
def test_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "other.npz", content)


def test_a_plain_array(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.arange(3))
    assert "not a saved program" in refusal(tmp_path / "array.npy")


def test_a_directory(tmp_path: Path) -> None:
    assert "not a saved program" in refusal(tmp_path)


def write(path: Path, header: Any, **arrays: Any) -> Path:
    """A program file with a header and arrays of one's own; None leaves an array out."""
    program = small_program("gqa2", 3)
    members = {name: getattr(program, name) for name in ARRAYS} | arrays
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, header=text, **{name: array for name, array in members.items() if array is not None})
    return path


def test_words_in_another_order_of_memory(tmp_path: Path) -> None:
    """A file may hold its columns one after another: what is proven by index is then also what lies in memory."""
    good = small_program("gqa2", 3)
    loaded = load_program(write(tmp_path / "columns.npz", good.header(), words=np.asfortranarray(good.words)))
    assert same(loaded, good)
    assert loaded.words.tobytes("A") == good.words.tobytes()


def test_arrays_of_any_layout_become_what_the_kernel_reads() -> None:
    good = small_program("gqa2", 3)
    arrays: dict[str, Any] = {name: np.repeat(getattr(good, name), 2, axis=0)[::2] for name in ARRAYS}
    assert not any(array.flags.c_contiguous for array in arrays.values())
    made = replace(good, **arrays)
    assert same(made, good) and all(getattr(made, name).flags.c_contiguous for name in ARRAYS)
    assert check(made).valid


def test_positions_that_a_program_decodes() -> None:
    """None before the first, none beyond its bucket, its cache or the model's tables."""
    short = small_program("gqa2", 3)
    program = replace(short, shape=replace(short.shape, bucket=short.shape.capacity))
    last = program.shape.capacity - 1
    program.require_positions(last, 1, 10**6)
    for position, tokens, capacity in ((last + 1, 1, 10**6), (-1, 1, 10**6), (last, 2, 10**6), (0, 0, 10**6), (9, 1, 9)):
        with pytest.raises(ValueError, match=f"{tokens} tokens from position {position}: this program decodes positions up to"):
            program.require_positions(position, tokens, capacity)
    short.require_positions(short.shape.bucket, 1, 10**6)
    with pytest.raises(ValueError, match=f"decodes positions up to {short.shape.bucket}"):
        short.require_positions(short.shape.bucket + 1, 1, 10**6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": "something-else"}, "not a saved program"),
        ({"version": VERSION + 1}, f"program version {VERSION + 1}, this is {VERSION}"),
        ({"version": None}, "program version None"),
        ({"config": {}}, "missing key"),
        ({"config": None}, "must be an object"),
        ({"capacity": "many"}, "damaged header"),
        ({"ring": None}, "damaged header"),
    ],
)
def test_a_wrong_header(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = small_program("gqa2", 3).header()
    load_program(write(tmp_path / "good.npz", good))
    path = write(tmp_path / "bad.npz", good | change)
    assert message in refusal(path) and str(path) in refusal(path)


@pytest.mark.parametrize(
    "missing", ["magic", "version", "config", "itemsize", "capacity", "bucket", "slices", "policy", "ring"]
)
def test_a_header_with_something_missing(tmp_path: Path, missing: str) -> None:
    header = small_program("gqa2", 3).header()
    del header[missing]
    refusal(write(tmp_path / "bad.npz", header))


@pytest.mark.parametrize("header", [[], MAGIC, 3, None])
def test_a_header_that_is_no_object(tmp_path: Path, header: Any) -> None:
    assert "not a saved program" in refusal(write(tmp_path / "bad.npz", header))


WORDS = small_program("gqa2", 3).words
STARTS = small_program("gqa2", 3).starts


@pytest.mark.parametrize(
    "arrays",
    [
        {"words": WORDS.astype(np.int64)},
        {"words": WORDS.astype(np.float32)},
        {"words": WORDS[:, :-1]},
        {"words": WORDS[:-1]},
        {"words": WORDS.ravel()},
        {"words": np.array([{}], dtype=object)},
        {"starts": STARTS[:-1]},
        {"starts": STARTS[:0]},
        {"starts": STARTS[::-1].copy()},
        {"starts": STARTS + 1},
        {"starts": np.int32(0)},
        {"targets": np.zeros((2, 2), dtype=np.int32)},
        {"uses": np.zeros(2, dtype=np.int32)},
        {"uses": None},
    ],
)
def test_arrays_that_do_not_belong_together(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = write(tmp_path / "bad.npz", small_program("gqa2", 3).header(), **arrays)
    assert "make" in refusal(path) and str(path) in refusal(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.npz", small_program("gqa2", 3).header(), targets=np.array([print], dtype=object))
    assert "make it again" in refusal(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.npz"
    small_program("gqa2", 3).save(path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="no space left"):
        small_program("mha", 3).save(path)
    assert path.read_bytes() == before
