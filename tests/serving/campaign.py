"""Many clients at once, some of whom leave and some of whom send nonsense: does every other get its own answer, and does the
server stay as it was?

    python -m tests.serving.campaign --requests 10000            # plain PyTorch and the bundled model, 10 to 20 minutes
    python -m tests.serving.campaign --requests 10000 --scripted # an engine that computes nothing, some two

Every choice is drawn from the seed.  An answer is right where it is the one that its prompt was given when it was asked alone.
The numbers of plain PyTorch depend a little on how many tokens it reads at once, and so on what the cache held: where two
tokens are as good as equally likely, an answer may go on otherwise.  Such ties are counted apart: they begin like their own and
belong to no other.  The last line is JSON; exit status 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

import httpx

from models.command import Parser, command, start, whole
from tests.support.served import SCRIPTED, SERVE, Served, served

CLIENTS = 16
PROMPTS = 32
TOKENS = 24  # of an answer at most
LEAVING, MALFORMED = 0.2, 0.1  # of all requests
PATIENCE = 120.0  # seconds for any request
GROWTH = 1.05, 16 * 2**20  # of the server's memory from a quarter of the campaign on: by a factor, and bytes on top
ALIKE, TIES = 16, 500  # characters that a near tie has in common with what was due; one answer in so many may be one
HANDLES = 4  # more open files than at the beginning: connections of this client that are being closed

WORDS = "list dict value string file error class module return the of a in to and object"
NONSENSE: list[tuple[str, Any]] = [
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", {"model": "bundled", "messages": []}),
    ("/v1/chat/completions", {"model": "bundled", "messages": [{"role": "user", "content": 7}]}),
    ("/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"model": "bundled", "messages": [{"role": "user", "content": "a"}], "temperature": 9}),
    ("/v1/chat/completions", {"model": "bundled", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}),
    ("/v1/completions", {"model": "bundled", "prompt": "a", "max_tokens": 10**6}),
    ("/v1/completions", {"model": "bundled", "prompt": [10**7]}),
    ("/v1/completions", {"model": "bundled", "prompt": "a", "colour": "red"}),
    ("/v1/completions", b"\xff\xfe"),
    ("/nowhere", {}),
]


@dataclass
class Outcome:
    """What a campaign found.  `memory_mib` and `handles` are the server's, ten times along the way."""

    requests: int
    seed: int
    answered: int = 0
    left: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory_mib: list[float] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """One server and its clients."""

    def __init__(self, server: Served, requests: int, seed: int) -> None:
        self.server, self.random = server, random.Random(seed)
        self.outcome = Outcome(requests, seed)
        words = WORDS.split()
        self.prompts = [
            f"{number} " + " ".join(self.random.choices(words, k=self.random.randrange(1, 60)))
            for number in range(min(PROMPTS, 2 + requests // 6))
        ]
        self.alone: dict[str, str] = {}
        self.left = iter(range(requests))
        self.faults = 0

    def body(self, prompt: str, tokens: int, stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": "bundled", "messages": messages, "max_tokens": tokens, "stream": stream, "temperature": 0}

    async def run(self) -> Outcome:
        began = time.perf_counter()
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE, limits=limits) as http:
            self.faults = (await http.get("/health")).json()["faults"]
            for prompt in self.prompts:
                answer = await http.post("/v1/chat/completions", json=self.body(prompt, TOKENS, False))
                self.alone[prompt] = answer.json()["choices"][0]["message"]["content"]
            self.look()
            await asyncio.gather(*(self.client(http) for _ in range(CLIENTS)))
            self.look()
            await self.settle(http)
        self.judge()
        self.outcome.seconds = round(time.perf_counter() - began, 1)
        return self.outcome

    async def client(self, http: httpx.AsyncClient) -> None:
        for number in self.left:
            kind, choice = self.random.random(), random.Random(self.random.random())
            try:
                if kind < MALFORMED:
                    await self.nonsense(http, choice)
                elif kind < MALFORMED + LEAVING:
                    await self.leave(http, choice)
                else:
                    await self.ask(http, choice)
            except httpx.HTTPError as error:
                self.outcome.wrong.append(f"request {number}: {type(error).__name__} {error}")
            if (number + 1) % max(1, self.outcome.requests // 10) == 0:
                self.look()

    async def ask(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        prompt, tokens, stream = choice.choice(self.prompts), choice.randrange(1, TOKENS + 1), choice.random() < 0.5
        answer = await http.post("/v1/chat/completions", json=self.body(prompt, tokens, stream))
        text = streamed(answer.text) if stream else answer.json()["choices"][0]["message"]["content"]
        due = self.alone[prompt]
        # An answer that ends within a character shows it as lost.
        if not due.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")) or not (text or tokens < 3):
            owners = [other for other, said in self.alone.items() if text and said.startswith(text)]
            told = f"{prompt[:20]!r}: {text!r}, where {due!r} was due; it belongs to {owners}"
            alike = len(commonprefix([text, due])) >= ALIKE and not owners
            (self.outcome.ties if alike else self.outcome.wrong).append(told)
        self.outcome.answered += 1

    async def leave(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        """Read some events and close, or do not even wait for the first."""
        body = self.body(choice.choice(self.prompts), TOKENS, True)
        if choice.random() < 0.3:
            with suppress(TimeoutError):
                await asyncio.wait_for(http.post("/v1/chat/completions", json=body), choice.uniform(0.001, 0.05))
        else:
            wanted = choice.randrange(1, 4)
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    wanted -= line.startswith("data")
                    if not wanted:
                        break
        self.outcome.left += 1

    async def nonsense(self, http: httpx.AsyncClient, choice: random.Random) -> None:
        path, body = choice.choice(NONSENSE)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        if not 400 <= answer.status_code < 500 or "error" not in answer.json():
            self.outcome.wrong.append(f"{path} {content[:60]!r} was answered {answer.status_code}")
        self.outcome.refused += 1

    async def settle(self, http: httpx.AsyncClient) -> None:
        """Nothing is left of those who went."""
        for _ in range(100):
            health = (await http.get("/health")).json()
            if not (health["running"] or health["waiting"]):
                break
            await asyncio.sleep(0.05)
        if health["running"] or health["waiting"] or health["state"] != "ok" or health["faults"] != self.faults:
            self.outcome.wrong.append(f"at the end the server says {health}")

    def look(self) -> None:
        process = Path(f"/proc/{self.server.process.pid}")
        resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
        self.outcome.memory_mib.append(round(int(resident.split()[1]) / 1024, 1))
        self.outcome.handles.append(len(list((process / "fd").iterdir())))

    def judge(self) -> None:
        """Memory and open files at the end against those after a quarter of the way; and are ties as rare as they should be?"""
        if len(self.outcome.ties) > max(1, self.outcome.answered // TIES):
            self.outcome.wrong.extend(self.outcome.ties)
        memory, handles = self.outcome.memory_mib, self.outcome.handles
        settled = memory[len(memory) // 4]
        if memory[-1] > settled * GROWTH[0] + GROWTH[1] / 2**20:
            self.outcome.wrong.append(f"memory grew from {settled} to {memory[-1]} MiB")
        if handles[-1] > max(handles[1 : len(handles) // 2 + 1]) + HANDLES:
            self.outcome.wrong.append(f"open files grew: {handles}")


def streamed(text: str) -> str:
    """The words of a stream that has ended."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", text
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


def campaign(requests: int, seed: int, scripted: bool) -> Outcome:
    """Start a server, run, stop it."""
    with served("--context", "512", program=SCRIPTED if scripted else SERVE) as server:
        return asyncio.run(Campaign(server, requests, seed).run())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m tests.serving.campaign", description="Many clients at once, good, bad and gone.")
    parser.add_argument("--requests", type=whole(1, 10**7), default=10000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**32), default=0, help="of every choice (default: %(default)s)")
    parser.add_argument("--scripted", action="store_true", help="with an engine that computes nothing")
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0 where nothing was wrong, else 1."""
    options = parse(arguments)
    outcome = campaign(options.requests, options.seed, options.scripted)
    print("\n".join(outcome.wrong[:20]))
    print(json.dumps(asdict(outcome)))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    start(main)
