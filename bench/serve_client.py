"""The client of `bench.serve`: completions over raw sockets, so that what is measured is the server and not a library.

A prompt is token ids, an answer a stream of events.  Times are seconds by time.perf_counter.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

DONE = b"data: [DONE]"
COUNTED = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
PIECE = re.compile(rb'"finish_reason"\s*:\s*null|"text"\s*:\s*"[^"]')  # the last piece of some servers says why it is the last
PATIENCE = 600.0  # seconds for an answer
READ = 1 << 16


@dataclass
class Answer:
    """When a request was sent, when its pieces came, and how many tokens it had; none where the server refused it."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    status: int = 0

    @property
    def first_ms(self) -> float:
        """From sending to the first piece."""
        return 1000 * (self.pieces[0] - self.sent)

    @property
    def ms_per_token(self) -> float:
        """Mean over the tokens after the first."""
        return 1000 * (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)

    @property
    def gaps_ms(self) -> list[float]:
        """Between pieces that follow one another: of those whose tokens come together, one."""
        return [1000 * (after - before) for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


NOTHING: Mapping[str, Any] = MappingProxyType({})


def request(model: str, host: str, prompt: Sequence[int], tokens: int, more: Mapping[str, Any] = NOTHING) -> bytes:
    """The bytes of one request; `more` of its fields."""
    asked = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
    body = json.dumps({**asked, "stream_options": {"include_usage": True}, **more}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Reading:
    """What has come of an answer; `take` says whether that is all."""

    def __init__(self, sent: float) -> None:
        self.answer, self._rest = Answer(sent), b""

    def take(self, chunk: bytes, at: float) -> bool:
        """More of it, cut anywhere, and when it came."""
        self._rest += chunk
        if not self.answer.status and b" " in self._rest[9:]:
            self.answer.status = int(self._rest.split(b" ", 2)[1])
        if self.answer.status and self.answer.status != 200:
            return True
        *events, self._rest = self._rest.split(b"\n\n")
        if any(PIECE.search(event) for event in events):
            self.answer.pieces.append(at)
        for event in events:
            if counted := COUNTED.search(event):
                self.answer.tokens = int(counted[1])
        return any(DONE in event for event in events)


class Stream:
    """One connection that asks one request after the other; `more`: fields of each."""

    def __init__(self, url: str, more: Mapping[str, Any] = NOTHING) -> None:
        self._host, self._more = urlsplit(url).netloc, more
        name, port = self._host.rsplit(":", 1)
        self._socket = socket.create_connection((name, int(port)), timeout=PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, model: str, prompt: Sequence[int], tokens: int) -> Answer:
        """Send, and wait for the whole answer."""
        sent = request(model, self._host, prompt, tokens, self._more)
        reading = Reading(time.perf_counter())
        self._socket.sendall(sent)
        while True:
            chunk = self._socket.recv(READ)
            if not chunk:
                raise ConnectionError("the server closed the connection in the middle of an answer")
            if reading.take(chunk, time.perf_counter()):
                return reading.answer

    def close(self) -> None:
        self._socket.close()


async def ask_once(url: str, model: str, prompt: Sequence[int], tokens: int, more: Mapping[str, Any] = NOTHING) -> Answer:
    """One request on a connection of its own."""
    host = urlsplit(url).netloc
    name, port = host.rsplit(":", 1)
    reading = Reading(time.perf_counter())
    reader, writer = await asyncio.open_connection(name, int(port))
    try:
        writer.write(request(model, host, prompt, tokens, more))
        while chunk := await asyncio.wait_for(reader.read(READ), PATIENCE):
            if reading.take(chunk, time.perf_counter()):
                break
        return reading.answer
    finally:
        writer.close()


@dataclass(frozen=True)
class Load:
    """Requests at random: `rate` a second on average, of prompts and answers of these many tokens, each drawn evenly."""

    rate: float
    requests: int
    prompt: tuple[int, int]
    tokens: tuple[int, int]
    vocab_size: int
    seed: int


async def open_loop(url: str, model: str, load: Load, more: Mapping[str, Any] = NOTHING) -> list[Answer]:
    """Poisson arrivals that wait for nobody: each request is sent when its time has come, whatever became of those before."""
    draws = random.Random(load.seed)
    waiting: list[asyncio.Task[Answer]] = []
    due = time.perf_counter()
    for _ in range(load.requests):
        due += draws.expovariate(load.rate)
        prompt = [draws.randrange(load.vocab_size) for _ in range(draws.randint(*load.prompt))]
        tokens = draws.randint(*load.tokens)
        await asyncio.sleep(due - time.perf_counter())
        waiting.append(asyncio.create_task(ask_once(url, model, prompt, tokens, more)))
    return list(await asyncio.gather(*waiting))
