"""The parent's end of one engine's process: start, ask with a time limit, pause, kill.

A paused engine is stopped by a signal (with every process it started), so that it takes no processor time from the one
that is measured; its GPU memory stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOG_LINES = 12
CHUNK = 1 << 16


class EngineFailure(Exception):
    """An engine cannot go on; the message says why.  `missing`: it is not installed."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class EngineProcess:
    """One engine's process.  `log` takes what the engine prints."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, directory: Path) -> None:
        self.log = log
        self.buffer = b""
        self.closed = False
        try:
            with log.open("wb") as stderr:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=dict(environment),
                    cwd=directory,
                    start_new_session=True,  # a process group of its own: signals reach whatever the engine starts
                )
        except OSError as error:
            raise EngineFailure(f"{command[0]}: {error.strerror}", missing=True) from None

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The result of one request; `timeout` in seconds.  Raises EngineFailure; after a missed limit the process is
        dead."""
        if self.closed:
            raise self._dead()
        deadline = time.monotonic() + timeout
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._dead() from None
        reply = json.loads(self._line(deadline, request["op"], timeout))
        if "missing" in reply:
            raise EngineFailure(f"its Python has no {', '.join(reply['missing'])}", missing=True)
        if "error" in reply:
            raise EngineFailure(reply["error"])
        result: dict[str, Any] = reply["result"]
        return result

    def _line(self, deadline: float, op: str, timeout: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            # short waits: a child of a dead engine may hold the pipe open, so that its end never comes
            ready, _, _ = select.select([descriptor], [], [], min(1.0, max(0.0, deadline - time.monotonic())))
            if ready:
                piece = os.read(descriptor, CHUNK)
                if not piece:
                    raise self._dead()
                self.buffer += piece
            elif self.process.poll() is not None:
                raise self._dead()
            elif time.monotonic() >= deadline:
                self.kill()
                raise EngineFailure(f"no answer to {op!r} within {timeout:.0f} s, killed; {self.last_words()}")
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _dead(self) -> EngineFailure:
        self.kill()
        return EngineFailure(f"its process ended (status {self.process.returncode}); {self.last_words()}")

    def last_words(self) -> str:
        """The last lines of what it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return "it printed nothing" if not lines else "its last lines: " + " | ".join(lines[-LOG_LINES:])

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self, timeout: float) -> None:
        """Let the engine end by itself, then make sure of it."""
        if self.process.poll() is None:
            self.resume()
            with contextlib.suppress(EngineFailure):
                self.ask({"op": "close"}, timeout)
        self.kill()

    def kill(self) -> None:
        """End the process and all that it started; harmless when it is dead."""
        if self.closed:
            return
        self._signal(signal.SIGKILL)
        self.closed = True
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _signal(self, number: int) -> None:
        if self.closed:
            return  # its number may belong to another process by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
