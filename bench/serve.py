"""What serving costs over the engine itself, and what clients see as the load grows.

    python -m bench.serve --model random:llama-3.2-1b

First one stream: milliseconds to the first token and a token, of the engine alone in a process of its own, then of the server
with such an engine over HTTP, the same prompts.  Then tokens a second of several streams at once.  Then an open loop: requests
arrive at random, at several shares of what the server can do, and wait for nobody; time to the first token, time a token and
time between pieces at their percentiles.  The same then of vLLM's and SGLang's servers, where they are installed or `--peer`
says where.  Prints a table, writes a record and a picture, and ends with the record as one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.decode import ROOT
from bench.record import Spread, describe, gpu_state
from bench.record_file import make_folder, save_record
from bench.serve_chart import draw
from bench.serve_client import NOTHING, Answer, Load, Stream, open_loop
from bench.serve_peers import (
    RANDOM,
    WHOLE,
    Peer,
    can_serve,
    choose_peers,
    free_port,
    peer_model,
    peer_server,
    peer_version,
    server_options,
)
from megakernel.loading import BACKENDS, load_engine
from megakernel.request import SamplingParams
from models.checkpoint import open_checkpoint
from models.command import Parser, add_model, command, start, whole
from models.errors import MachineError
from models.output import output_path

SHARES = (0.2, 0.5, 0.8, 0.95)  # of what the server can do, one request after the other
PERCENTILES = (50, 95, 99)
WARM = 12  # requests before those that count: an engine's first ten have been seen to take a third longer
STREAMS, ROUNDS = (1, 2, 4, 8), 2  # at once, and how often the most of them ask
QUEUE = 100_000  # in the open loop nobody is refused: the time in the queue is what is measured
NAME = "measured"
TOKEN_LIMIT_MS, FIRST_LIMIT_MS = 0.03, 1.0  # of what serving one stream may cost, a token and on the first token

Times = dict[str, list[float]]  # "first_ms" and "ms_per_token" of each run


def prompts(length: int, count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """No two begin alike, so that nothing of one is kept for the next."""
    draws = random.Random(seed)
    return [[draws.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def engine_alone(
    model: str, backend: str, capacity: int | None, sequences: int | None, asked: Sequence[Sequence[int]], tokens: int
) -> Times:
    """The server's engine without it, its tokens taken as the server takes them; `WARM` of the prompts do not count."""
    times: Times = {"first_ms": [], "ms_per_token": []}
    with load_engine(model, backend=backend, capacity=capacity, sequences=sequences) as engine:
        sampling = SamplingParams(stop_token_ids=tuple(engine.config.eos_token_ids))
        for prompt in asked:
            began = time.perf_counter()
            generation = engine.generate(prompt, tokens, sampling)
            count, first = len(generation.steps()), time.perf_counter()
            while more := generation.steps():
                count += len(more)
            ended = time.perf_counter()
            times["first_ms"].append(1000 * (first - began))
            times["ms_per_token"].append(1000 * (ended - first) / max(1, count - 1))
    return {name: values[WARM:] for name, values in times.items()}


def apart(*arguments: Any) -> Times:
    """`engine_alone` in a process of its own, whose memory is free afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(engine_alone, arguments)


def served_stream(url: str, asked: Sequence[Sequence[int]], tokens: int, more: Mapping[str, Any] = NOTHING) -> Times:
    """The same over HTTP, on one connection; `more`: further fields of each request."""
    stream = Stream(url, more)
    answers = [stream.ask(NAME, prompt, tokens) for prompt in asked][WARM:]
    stream.close()
    if refused := [one.status for one in answers if one.status != 200 or not one.pieces]:
        raise MachineError(
            f"the server answered {len(refused)} of {len(answers)} requests with status {refused[0]} or with nothing"
        )
    return {"first_ms": [one.first_ms for one in answers], "ms_per_token": [one.ms_per_token for one in answers]}


def together(url: str, asked: Sequence[Sequence[int]], tokens: int, streams: int, more: Mapping[str, Any] = NOTHING) -> float:
    """Tokens a second of all streams, each with a connection of its own that asks for one prompt after the other."""

    def one(mine: Sequence[Sequence[int]]) -> int:
        stream = Stream(url, more)
        try:
            return sum(stream.ask(NAME, prompt, tokens).tokens for prompt in mine)
        finally:
            stream.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        total = sum(pool.map(one, [asked[place::streams] for place in range(streams)]))
    return total / (time.perf_counter() - began)


@contextmanager
def server(model: str, backend: str, capacity: int | None, sequences: int | None) -> Iterator[str]:
    """The real server in a process of its own; its address."""
    options = ["--model", model, "--backend", backend, "--port", "0", "--name", NAME, "--queue", str(QUEUE)]
    options += ["--queue-seconds", "3600", "--answer-seconds", "3600"]
    options += [] if capacity is None else ["--context", str(capacity)]
    options += [] if sequences is None else ["--sequences", str(sequences)]
    command = [sys.executable, "-m", "serving", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            yield address(process)
        finally:
            process.terminate()
            process.communicate(timeout=60)


def address(process: subprocess.Popen[str]) -> str:
    """What the server says that it listens on.  From there on its log is read and dropped, lest the pipe fill."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said = line.strip() or said
        if found := re.search(r"listening on (http://\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[1]
    raise MachineError(f"the server ended before it listened: {said}")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99: the least value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return {f"p{share}": round(ordered[max(0, -(-len(ordered) * share // 100) - 1)], 3) for share in PERCENTILES}


def load_record(load: Load, share: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """What clients saw at one rate."""
    good = [one for one in answers if one.status == 200 and one.pieces]
    return {
        "share": share,
        "requests_a_second": round(load.rate, 3),
        "requests": load.requests,
        "answered": len(good),
        "first_token_ms": percentiles([one.first_ms for one in good]),
        "ms_per_token": percentiles([one.ms_per_token for one in good]),
        "between_pieces_ms": percentiles([gap for one in good for gap in one.gaps_ms] or [0.0]),
    }


def line(record: dict[str, Any]) -> str:
    """One rate for people to read."""
    first, each = record["first_token_ms"], record["ms_per_token"]
    return (
        f"{record['share']:>6.0%} of capacity, {record['requests_a_second']:.2f} requests/s: first token after "
        f"{first['p50']:.1f} ms (p95 {first['p95']:.1f}, p99 {first['p99']:.1f}), "
        f"a token {each['p50']:.3f} ms (p99 {each['p99']:.3f})"
    )


def overhead(engine: Times, served: Times) -> dict[str, Any]:
    """Of one stream: medians with and without the server, and their difference beside what it may be."""
    spreads = {name: {"engine": Spread.of(engine[name]), "served": Spread.of(served[name])} for name in engine}
    cost = {name: round(pair["served"].median - pair["engine"].median, 4) for name, pair in spreads.items()}
    return {
        **{name: {kind: asdict(spread) for kind, spread in pair.items()} for name, pair in spreads.items()},
        "cost_ms": cost,
        "limit_ms": {"first_ms": FIRST_LIMIT_MS, "ms_per_token": TOKEN_LIMIT_MS},
        "within_limits": cost["first_ms"] <= FIRST_LIMIT_MS and cost["ms_per_token"] <= TOKEN_LIMIT_MS,
    }


def all_streams(url: str, options: argparse.Namespace, vocab_size: int, more: Mapping[str, Any] = NOTHING) -> dict[int, float]:
    """Tokens a second of so many streams together."""
    found = {}
    for streams in STREAMS:
        others = prompts(options.prompt, ROUNDS * max(STREAMS), vocab_size, seed=streams)
        found[streams] = round(together(url, others, options.tokens, streams, more), 1)
    rates = ", ".join(f"{rate:.0f} of {streams}" for streams, rate in found.items())
    print(f"tokens a second of so many streams together: {rates}", flush=True)
    return found


def all_loads(
    url: str, options: argparse.Namespace, vocab_size: int, rates: Sequence[float], more: Mapping[str, Any] = NOTHING
) -> list[dict[str, Any]]:
    """What clients see at so many requests a second, each some share of what our server can do."""
    found = []
    for number, (share, rate) in enumerate(zip(SHARES, rates, strict=True)):
        sizes = (max(1, options.prompt // 2), options.prompt), (1, options.tokens)
        load = Load(rate, options.requests, *sizes, vocab_size, number)
        found.append(load_record(load, share, asyncio.run(open_loop(url, NAME, load, more))))
        print(line(found[-1]), flush=True)
    return found


def beside(
    peer: Peer, options: argparse.Namespace, vocab_size: int, asked: Sequence[Sequence[int]], rates: Sequence[float]
) -> dict[str, Any]:
    """The same of another server, at the same requests a second; or why there is nothing of it."""
    print(f"{peer.label}:", flush=True)
    context = options.context or -(-(options.prompt + options.tokens) // 256) * 256
    made_up, port = options.model.startswith(RANDOM), free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        model = str(peer_model(options.model, folder / "model"))
        started = server_options(peer, model, context, options.sequences or max(STREAMS), port, NAME, made_up)
        told = ["python", "-m", *(options.model if part == model else part for part in started)]
        found: dict[str, Any] = {"version": peer_version(peer), "command": told}
        try:
            with peer_server(peer, started, port, folder / "log") as url:
                times = served_stream(url, asked, options.tokens, WHOLE)
                found["one_stream"] = {name: asdict(Spread.of(values)) for name, values in times.items()}
                first, each = (found["one_stream"][name]["median"] for name in ("first_ms", "ms_per_token"))
                print(f"one stream: first token after {first:.2f} ms, a token {each:.3f} ms", flush=True)
                found["streams"] = all_streams(url, options, vocab_size, WHOLE)
                found["loads"] = all_loads(url, options, vocab_size, rates, WHOLE)
        except (MachineError, OSError, ValueError) as error:
            found["error"] = str(error).replace(name, "")
            print(found["error"], flush=True)
    return found


def measure(options: argparse.Namespace, peers: Sequence[Peer] = ()) -> dict[str, Any]:
    """Everything, as the record."""
    vocab_size = open_checkpoint(options.model).config.vocab_size
    asked = prompts(options.prompt, WARM + options.runs, vocab_size)
    record: dict[str, Any] = {
        "benchmark": "serve",
        "model": options.model,
        "backend": options.backend,
        "command": ["python", "-m", "bench.serve", *sys.argv[1:]],
        "machine": describe(ROOT, options.commit),
        "versions": {"python": platform.python_version()},
        "clocks_before": gpu_state(),
        "sequences": options.sequences,
        "prompt": options.prompt,
        "tokens": options.tokens,
    }
    engine = apart(options.model, options.backend, options.context, options.sequences, asked, options.tokens)
    with server(options.model, options.backend, options.context, options.sequences) as url:
        record["one_stream"] = overhead(engine, served_stream(url, asked, options.tokens))
        cost = record["one_stream"]["cost_ms"]
        print(
            f"serving one stream costs {cost['ms_per_token']:.4f} ms a token, {cost['first_ms']:.3f} ms on the first",
            flush=True,
        )
        record["streams"] = all_streams(url, options, vocab_size)
        first, each = (record["one_stream"][name]["served"]["median"] for name in ("first_ms", "ms_per_token"))
        seconds = (first + options.tokens / 2 * each) / 1000  # of a request, on average
        record["loads"] = all_loads(url, options, vocab_size, [share / seconds for share in SHARES])
    rates = [load["requests_a_second"] for load in record["loads"]]
    record["peers"] = {peer.name: beside(peer, options, vocab_size, asked, rates) for peer in peers}
    record["clocks_after"] = gpu_state()
    return record


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.serve", description="What serving costs, and what clients see under load.")
    add_model(parser, default="random:llama-3.2-1b")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="as of the server (default %(default)s)")
    parser.add_argument("--context", type=whole(2, 2**24), help="tokens of the KV cache (default: the server's)")
    parser.add_argument("--sequences", type=whole(1, 8), help="that decode together (default: the server's)")
    parser.add_argument("--prompt", type=whole(2, 2**20), default=64, help="tokens of a prompt at most (default %(default)s)")
    parser.add_argument("--tokens", type=whole(2, 2**20), default=128, help="tokens of an answer at most (default %(default)s)")
    parser.add_argument("--runs", type=whole(1, 1000), default=20, help="of the one stream (default %(default)s)")
    parser.add_argument("--requests", type=whole(2, 10**6), default=200, help="at each rate (default %(default)s)")
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME=PYTHON[:PATH]",
        help="measure vllm or sglang, too, in this interpreter, with a folder for the front of its PYTHONPATH; may be "
        "repeated; none: no other server (default: those installed here)",
    )
    parser.add_argument("--output", type=output_path, default=ROOT / "bench" / "results", help="folder (default %(default)s)")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, 1 where serving one stream costs more than it may, 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    peers = choose_peers(options.peer)
    if peers and not can_serve(options.model):
        print(f"{options.model} is no directory that other servers read: they are left out", file=sys.stderr)
        peers = []
    make_folder(options.output)
    record = measure(options, peers)
    save_record(record, options.output, draw)
    return 0 if record["one_stream"]["within_limits"] else 1


if __name__ == "__main__":
    start(main)
