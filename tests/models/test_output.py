"""Files that commands write: whole or not there, and nothing but a regular file is ever replaced."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from models import output
from models.errors import UserError
from models.output import discard_partial_files, output_path, require_file, write_file


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "né\n")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "né\n"
    (tmp_path / "a").chmod(0o640)
    write_file(tmp_path / "a", b"\0other")
    assert (tmp_path / "a").read_bytes() == b"\0other"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640, "whoever could read it still can"
    assert entries(tmp_path) == ["a"]


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    name = "n" * 255
    write_file(tmp_path / name, "x")
    assert entries(tmp_path) == [name]


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/new")
    for text in ("first", "second"):
        write_file(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "new").read_text() == text
    assert entries(tmp_path / "folder") == ["new"]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is a pipe"),
        (make_socket, "is a socket"),
        (lambda path: path.symlink_to("/dev/null"), "is a device"),
    ],
)
def test_what_is_no_file_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], named: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = Path("output")
    make(path)
    before = path.stat()
    with pytest.raises(UserError, match=f"^output: {named}, not a file: name another output$"):
        write_file(path, "x")
    assert (path.stat().st_mode, path.stat().st_ino) == (before.st_mode, before.st_ino)
    assert entries(tmp_path) == ["output"]


def test_what_a_command_prints_to_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "printed").write_text("x")
    here = (tmp_path / "printed").stat()
    monkeypatch.setattr(os, "fstat", lambda descriptor: here)
    with pytest.raises(UserError, match="prints to"):
        require_file(tmp_path / "printed")


@pytest.mark.parametrize("place", ["no/such/folder/a", "file/a"])
def test_a_place_that_is_not_there(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / place, "x")
    assert caught.value.filename == str(tmp_path / place), "the name that the user gave"
    assert entries(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    (tmp_path / "a").write_text("before")

    def fail(*_: object) -> None:
        assert len(entries(tmp_path)) == 2, "the new file stands beside the old one"
        raise failure

    monkeypatch.setattr(output.Path, "replace", fail)
    with pytest.raises(type(failure)):
        write_file(tmp_path / "a", "after")
    assert entries(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_process_that_ends_at_once_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(partial: Path, target: Path) -> None:
        discard_partial_files()
        assert entries(tmp_path) == []
        raise KeyboardInterrupt

    monkeypatch.setattr(output.Path, "replace", end)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(PermissionError):
        write_file(tmp_path / "a", "after")


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_a_name_that_is_none(text: str) -> None:
    with pytest.raises(Exception, match="is empty|zero character"):
        output_path(text)
