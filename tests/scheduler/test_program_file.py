"""A program survives being saved and loaded, and a file that is none, or is damaged, is refused in one line."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Callable
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
        ({"tail": 1}, "damaged header"),
    ],
)
def test_a_wrong_header(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = small_program("gqa2", 3).header()
    load_program(write(tmp_path / "good.npz", good))
    path = write(tmp_path / "bad.npz", good | change)
    assert message in refusal(path) and str(path) in refusal(path)


@pytest.mark.parametrize(
    "missing", ["magic", "version", "config", "itemsize", "capacity", "bucket", "slices", "tail", "policy", "ring"]
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


@pytest.mark.parametrize(
    "change", [{"policy": "a\x1b[2J"}, {"policy": 3}, {"policy": "x" * 1000}, {"ring": True}, {"ring": 4.0}]
)
def test_what_is_no_value_of_the_header(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "damaged header" in refusal(write(tmp_path / "bad.npz", small_program("gqa2", 3).header() | change))


def write_text(path: Path, header: str) -> Path:
    """A program file whose header is any text."""
    program = small_program("gqa2", 3)
    np.savez(path, header=np.frombuffer(header.encode(), np.uint8), **{name: getattr(program, name) for name in ARRAYS})
    return path


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999", "9" * 400, "9" * 5000, "-1", str(2**31)])
@pytest.mark.parametrize("name", ["capacity", "ring", "num_layers", "rms_eps"])
def test_numbers_that_no_header_holds(tmp_path: Path, name: str, number: str) -> None:
    """All but a large but finite epsilon, which is a number like any other."""
    header = json.loads(json.dumps(small_program("gqa2", 3).header()))
    (header["config"] if name in header["config"] else header)[name] = "HERE"
    path = write_text(tmp_path / "bad.npz", json.dumps(header).replace('"HERE"', number))
    if (name, number) == ("rms_eps", str(2**31)):
        read_program(path)
    else:
        assert str(path) in refusal(path)


@pytest.mark.parametrize("header", ["[" * 30_000, '{"a":' * 10_000, " " * 70_000, "\xff", '{"magic": "\\ud800'])
def test_headers_that_are_no_json(tmp_path: Path, header: str) -> None:
    assert "make it again" in refusal(write_text(tmp_path / "bad.npz", header))


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "program.npz")
    begun = time.perf_counter()
    assert "no regular file" in refusal(tmp_path / "program.npz")
    assert time.perf_counter() - begun < 1.0


def array_file(shape: str, data: bytes, kind: str = "<i4") -> bytes:
    """An `.npy` file that claims a shape."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"
    padded = text + " " * (63 - (len(text) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + data


def write_members(path: Path, **changed: bytes) -> Path:
    """A good program with other bytes for some of its members."""
    good = io.BytesIO()
    program = small_program("gqa2", 3)
    header = np.frombuffer(json.dumps(program.header()).encode(), np.uint8)
    np.savez(good, header=header, **{name: getattr(program, name) for name in ARRAYS})
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, changed.get(name.removesuffix(".npy"), source.read(name)))
    return path


def test_members_may_be_written_anew(tmp_path: Path) -> None:
    """What the next test damages is sound to begin with."""
    words = small_program("gqa2", 3).words
    path = write_members(tmp_path / "good.npz", words=array_file(str(words.shape), words.tobytes()))
    assert same(load_program(path), small_program("gqa2", 3))


@pytest.mark.parametrize(
    "words",
    [
        array_file("(1000000000000, 32)", b""),
        array_file("(100000, 100000, 32)", b"\0" * 64),
        array_file("(-1, -32)", b"\0" * 128),
        array_file("(1, 32)", b"\0" * 256),
        array_file("(" + "9" * 4000 + ",)", b""),
        array_file("(" * 4000, b""),
        array_file("(0, 32)", b"", "|O"),
        array_file("(2097152, 32)", b"\0" * 2**28),  # a zip bomb: a quarter of a megabyte that becomes a thousand times as much
    ],
    ids=range(8),
)
def test_arrays_that_claim_more_than_there_is(tmp_path: Path, words: bytes) -> None:
    """Refused before the memory is taken."""
    import tracemalloc

    path = write_members(tmp_path / "bad.npz", words=words)
    del words
    tracemalloc.start()
    try:
        assert "make it again" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_a_directory_of_very_many_members(tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    small_program("gqa2", 3).save(path)
    with zipfile.ZipFile(path, "a") as file:
        for number in range(100):
            file.writestr(f"{number}", b"")
    assert "more than 32" in refusal(path)


def test_a_comment_cannot_hide_another_directory(tmp_path: Path) -> None:
    path = tmp_path / "comment.npz"
    small_program("gqa2", 3).save(path)
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"x" * 30
    refusal(path)
