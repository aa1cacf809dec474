"""A real server in a process of its own, on a free port."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai

from tests.support import ROOT

SECONDS = 90  # for a server to start, on a busy machine
SERVE = ("-m", "serving", "--backend", "torch")
SCRIPTED = ("-m", "tests.support.scripted")


class Served:
    """`url` of the server; `log` is what it has written to stderr so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.log = process, [""]
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._address()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put("")

    def _address(self) -> str:
        while line := self._lines.get(timeout=SECONDS):
            if found := re.search(r"listening on (http://\S+)", line):
                return found[1]
        raise RuntimeError(f"the server ended: {''.join(self.log)}")

    def client(self, key: str = "none") -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        self.http.close()
        return status


@contextmanager
def served(*options: str, program: tuple[str, ...] = SCRIPTED, **environment: str) -> Iterator[Served]:
    """A server with these options; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, *program, "--port", "0", *options],
        cwd=ROOT,
        env=os.environ | {"MEGAKERNEL_MODEL": "bundled", "OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        server = Served(process)
        yield server
        server.stop()
    finally:
        process.kill()
        process.wait()
