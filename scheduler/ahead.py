"""Programs made ahead, by one other process: its interpreter takes no time from this one's.

The process runs the same code as this one would, from the same files, and proves every program.  What it proved and what
arrives here is compared by a digest over all arrays and the header; the header must be the one that was asked for.  Whatever
goes wrong over there, the program is made here: nobody waits for ever, and nothing else is accepted.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Condition, Thread
from typing import IO, Any

import numpy as np

from instructions.shape import Shape
from scheduler.program import ARRAYS, MOST_BYTES, Program, arrays_fit

PROCESS = Path(__file__).with_name("program_process.py")
Which = tuple[int, bool]  # a program's place among the buckets, and whether its tail is meant
PATIENCE = 60.0  # seconds; a program takes 1 to 5


def digest(program: Program) -> str:
    """A hash over all that a program is."""
    found = hashlib.sha256(json.dumps(program.header(), sort_keys=True).encode())
    for name in ARRAYS:
        array = getattr(program, name)
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def send(file: IO[bytes], which: Which, program: Program) -> None:
    """Write a proven program: a line of JSON, then the bytes of its arrays."""
    sizes = [getattr(program, name).shape for name in ARRAYS]
    line = {"which": which, "ring": program.ring, "sizes": sizes, "digest": digest(program)}
    file.write(json.dumps(line).encode() + b"\n")
    for name in ARRAYS:
        file.write(getattr(program, name).tobytes())
    file.flush()


def receive(file: IO[bytes], shape_of: Callable[[Which], Shape], sms: int, policy: str) -> tuple[Which, Program]:
    """What `send` wrote of such a program; raises EOFError at the end, ValueError or LookupError where it is anything else."""
    line = file.readline()
    if not line:
        raise EOFError
    header = json.loads(line)
    arrays = {}
    for name, size in zip(ARRAYS, header["sizes"], strict=True):
        count = 4 * math.prod(size)
        if not 0 <= count <= MOST_BYTES:
            raise ValueError(f"{name} of {count} bytes")
        arrays[name] = np.frombuffer(file.read(count), dtype=np.int32).reshape(size)
    if not arrays_fit(arrays) or len(arrays["uses"]) != sms:
        raise ValueError("arrays of the wrong size")
    place, tail = header["which"]
    program = Program(shape_of((place, tail)), policy, header["ring"], **arrays)
    if digest(program) != header["digest"]:
        raise ValueError("not the program that was proven")
    return (place, tail), program


class Ahead:
    """Programs being made, in the order in which they are wanted."""

    def __init__(
        self, config: dict[str, Any], numbers: dict[str, Any], wanted: Iterable[Which], shape_of: Callable[[Which], Shape]
    ) -> None:
        self._changed = Condition()
        self._coming, self._made = list(wanted), dict[Which, Program]()
        path = [str(Path(__file__).parents[1]), *sys.path]
        request = {"path": path, "config": config, "numbers": numbers, "wanted": self._coming}
        command = [sys.executable, "-I", "-S", str(PROCESS)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for whoever started it
            )
        except OSError:
            self._coming.clear()
            return
        atexit.register(self.close)
        line = json.dumps(request).encode() + b"\n"
        arguments = (line, shape_of, numbers["sms"], numbers["policy"])
        self._thread = Thread(target=self._receive, args=arguments, name="ahead", daemon=True)
        self._thread.start()

    def take(self, which: Which) -> Program | None:
        """A program, as soon as it has come; None where it will not come."""
        with self._changed:
            self._changed.wait_for(lambda: which not in self._coming, PATIENCE)
            return self._made.get(which)

    def close(self) -> None:
        """End the process; nothing more will come."""
        with self._changed:
            self._coming.clear()
            self._changed.notify_all()
        atexit.unregister(self.close)
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()

    def _receive(self, request: bytes, shape_of: Callable[[Which], Shape], sms: int, policy: str) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with suppress(OSError, EOFError, ValueError, LookupError, TypeError):
            stdin.write(request)
            stdin.flush()
            while True:
                which, program = receive(stdout, shape_of, sms, policy)
                with self._changed:
                    if which in self._coming:
                        self._made[which] = program
                        self._coming.remove(which)
                    self._changed.notify_all()
        self.close()
        for file in (stdin, stdout):
            with suppress(OSError):
                file.close()
