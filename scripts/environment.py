"""Makes the project's own environment in `.venv` and prints the path of its Python interpreter.

`scripts/run`, `scripts/serve`, `scripts/chat` and `scripts/test` call it on every start: once the environment is there, it
answers within a second.
Standard library only, because it runs before anything is installed.  It does not know what will run in the environment.

Which torch: with an NVIDIA driver, the build of the package index, which brings CUDA.  Without one, the CPU build, some
gigabytes smaller, from PyTorch's own index or from the wheels that pip is configured to find.  Where neither has it, the
build of the package index again: it runs without a GPU too, it is only large.

When it can be trusted: `environment.json` in the environment names what was installed, and is written last.  An
environment without a matching one was interrupted, or made from other pins, and is made anew.  A folder that this file
did not make is never touched.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
STAMP = "environment.json"

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_TORCH = "torch==2.13.0+cpu"
INDEX_TORCH = "torch==2.11.0"  # depends on exactly the Triton that constraints.txt pins: a newer one would want another
SECOND_TRITON = "3.9.0"  # the newest: the kernel is compiled under it too, beside the one that constraints.txt pins

# For a Python whose ensurepip was split off into a package of its own (Debian and Ubuntu without python3-venv).
PIP_WHEEL = (
    "https://files.pythonhosted.org/packages/07/25/ee8c38ae72d66b844ce8eb9711ba905dba21ca1a8a0c960057c41cd23337/"
    "pip-26.3-py3-none-any.whl"
)
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"

# What can be asked for, in the order in which it is installed, and the extra of pyproject.toml that lists what it needs.
PARTS: dict[str, str | None] = {"run": None, "serve": "serve", "chat": "chat", "dev": "dev"}

Runner = Callable[[Sequence[str]], bool]


class SetupError(Exception):
    """The environment cannot be made; the message is one line that says what to do."""


def run_command(command: Sequence[str]) -> bool:
    """Run it, with its output on stderr (stdout is for the one line that this script prints). True if it succeeded."""
    # It inherits the lock of `ensure`: should this process be killed, nobody starts anew before its pip has ended as well.
    return subprocess.run(command, stdout=sys.stderr.fileno(), close_fds=False, check=False).returncode == 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def requirements(extra: str | None = None) -> list[str]:
    """What pyproject.toml asks for: the dependencies of the package, or those of one extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"][extra] if extra else project["dependencies"])


@dataclass(frozen=True)
class Environment:
    """One environment directory; `gpu` says which torch it wants, `run` executes a command."""

    directory: Path
    gpu: bool
    run: Runner = run_command

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def fingerprint(self) -> str:
        """Changes with everything that decides what is installed."""
        inputs = [*map(requirements, PARTS.values()), CONSTRAINTS.read_text(), self.gpu, sys.version]
        inputs += [CPU_TORCH, INDEX_TORCH, SECOND_TRITON]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def installed(self) -> set[str]:
        """The parts (see PARTS) that are completely installed from the present pins; none where nothing can be trusted."""
        try:
            stamp = json.loads((self.directory / STAMP).read_text())
        except (OSError, ValueError):
            return set()
        usable = stamp.get("fingerprint") == self.fingerprint() and os.access(self.python, os.X_OK)
        return set(stamp["parts"]) if usable else set()

    def write_stamp(self, parts: Iterable[str]) -> None:
        """Say what is completely installed, in one step: a reader sees the old stamp or the new one."""
        draft = self.directory / (STAMP + ".new")
        draft.write_text(json.dumps({"fingerprint": self.fingerprint(), "parts": sorted(parts)}) + "\n")
        draft.replace(self.directory / STAMP)

    def ensure(self, *parts: str) -> None:
        """Install what is missing of what a run needs and of these parts. Raises SetupError."""
        wanted = {"run", *parts}
        if wanted <= self.installed():
            return
        with open(__file__) as lock:  # two commands started at once: the second waits, then finds the work done
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.set_inheritable(lock.fileno(), True)
            installed = self.installed()
            if not installed:
                self.create()
                self.install_torch()
            missing = wanted - installed
            self.write_stamp([])
            for part in sorted(missing, key=list(PARTS).index):
                self.install_part(part)
            self.write_stamp(installed | missing)

    def create(self) -> None:
        """An empty environment with pip in it."""
        old = self.directory.with_name(self.directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.directory.exists():
            if not (self.directory / STAMP).exists():
                raise SetupError(
                    f"{self.directory} was not made by {Path(__file__).name}: "
                    "move it away, or set MEGAKERNEL_VENV to another folder"
                )
            self.directory.replace(old)  # renamed first: half a removed folder would look like somebody else's
            shutil.rmtree(old)
        say(f"Setting up {self.directory} (once; some minutes)")
        fresh = self.directory.with_name(self.directory.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        replace(self, directory=fresh).write_stamp([])
        fresh.replace(self.directory)  # never there without its stamp
        if not self.run([sys.executable, "-m", "venv", str(self.directory)]):
            say("This Python has no ensurepip: taking pip from PyPI")
            self.create_without_ensurepip()

    def create_without_ensurepip(self) -> None:
        wheel = self.directory / PIP_WHEEL.rpartition("/")[2]
        if not self.run([sys.executable, "-m", "venv", "--without-pip", str(self.directory)]):
            raise SetupError(f"{sys.executable} cannot make a virtual environment: install the package python3-venv")
        try:
            with urllib.request.urlopen(PIP_WHEEL, timeout=30) as response:
                wheel.write_bytes(response.read())
        except OSError as error:
            raise SetupError(f"cannot fetch pip from PyPI ({error}): install the package python3-venv") from None
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != PIP_SHA256:
            raise SetupError(f"{PIP_WHEEL} is not the file it should be: install the package python3-venv instead")
        self.run([str(self.python), str(wheel / "pip"), "install", "--quiet", "--no-index", str(wheel)])
        wheel.unlink()

    def pip(self, *arguments: str) -> bool:
        """`pip install` with these arguments; of what pip says only the errors are shown."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        return self.run([*command, *arguments])

    def pip_constrained(self, *arguments: str) -> bool:
        return self.pip("--constraint", str(CONSTRAINTS), *arguments)

    def install_torch(self) -> None:
        """See the module's docstring for which one. Its dependencies come with the rest."""
        if not self.pip_constrained("pip"):  # a current one: those that come with older Pythons do not know today's wheels
            raise SetupError("pip cannot install anything: is a package index within reach?")
        if not self.gpu:
            say("Installing torch, the CPU build (about 200 MB)")
            # Where that index cannot be reached this must fail soon, hence the limits; `+cpu` accepts no other build.
            limits = ["--index-url", CPU_INDEX, "--timeout", "15", "--retries", "1"]
            if self.pip_constrained("--no-deps", *limits, CPU_TORCH):
                return
            say(f"No CPU build of torch within reach: taking {INDEX_TORCH} from the package index")
        say("Installing torch with CUDA (some gigabytes)")
        if not self.pip_constrained(INDEX_TORCH):
            raise SetupError(f"pip cannot install {INDEX_TORCH}: its reason stands above")

    def install_part(self, part: str) -> None:
        """What pyproject.toml says that it needs; for "dev" also the second Triton, in a folder of its own."""
        say(f"Installing what is needed to {'test' if part == 'dev' else part}")
        if not self.pip_constrained(*requirements(PARTS[part])):
            raise SetupError("pip cannot install the dependencies: its reason stands above")
        if part == "dev":
            folder = self.directory / f"triton-{SECOND_TRITON}"
            if not self.pip("--no-deps", "--target", str(folder), f"triton=={SECOND_TRITON}"):
                raise SetupError(f"pip cannot install triton {SECOND_TRITON}: its reason stands above")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the project's environment and print the path of its Python.")
    parser.add_argument("--dev", action="append_const", dest="parts", const="dev", help="with what the tests and checks need")
    parser.add_argument("--serve", action="append_const", dest="parts", const="serve", help="with what the server needs")
    parser.add_argument("--chat", action="append_const", dest="parts", const="chat", help="with what the chat needs")
    parts = parser.parse_args().parts or []
    directory = Path(os.environ.get("MEGAKERNEL_VENV") or ROOT / ".venv").absolute()
    environment = Environment(directory, gpu=has_nvidia_driver())
    try:
        environment.ensure(*parts)
    except SetupError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("Interrupted: the next start makes the environment anew")
        return 130
    print(environment.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
