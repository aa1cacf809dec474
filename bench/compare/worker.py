"""The process of one engine: it loads the engine, runs what it is asked to, and holds the stopwatch.

    python -m bench.compare.worker MODULE:CLASS SETTINGS REQUIRED,MODULES DISTRIBUTION,NAMES

SETTINGS, a JSON object, go to the class by name.  One JSON object a line on stdin and stdout.  Every engine is timed by
`timed` alone, in a batch by `timed_together`.  Standard library only, and no newer Python than 3.10: it runs in the engine's
own environment.  It does not know which engine it holds.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from bench.compare.adapter import Adapter, LoadSpec

Clock = Callable[[], float]
Reply = dict[str, Any]
PR_SET_PDEATHSIG = 1


def timed(adapter: Adapter, request: Reply, clock: Clock) -> Reply:
    """Seconds from the request until all tokens are on the host, and when each piece came: [seconds, tokens] pairs."""
    prompt, tokens = request["prompt"], request["tokens"]
    gc.collect()  # so that no engine pays for another request's garbage
    stamps: list[list[float]] = []
    received: list[int] = []
    started = clock()
    for piece in adapter.generate(prompt, tokens, request["stream"]):
        received.extend(piece)
        stamps.append([round(clock() - started, 7), len(piece)])  # to 0.1 microseconds: records are kept
    seconds = clock() - started
    if len(received) != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {len(received)}")
    return {"seconds": seconds, "stamps": stamps, "tokens": [int(token) for token in received]}


def timed_together(adapter: Adapter, request: Reply, clock: Clock) -> Reply:
    """Seconds from the request until all tokens of all its prompts are on the host."""
    prompts, tokens = request["prompts"], request["tokens"]
    gc.collect()
    started = clock()
    found = adapter.generate_together(prompts, tokens)
    seconds = clock() - started
    counts = [len(each) for each in found]
    if counts != [tokens] * len(prompts):
        raise RuntimeError(f"asked for {tokens} tokens after each of {len(prompts)} prompts, got {counts}")
    return {"seconds": seconds, "stamps": [], "tokens": [[int(token) for token in each] for each in found]}


def profiled(adapter: Adapter, request: Reply) -> Reply:
    """The kernels that run during a generation of tokens after some prompts, untimed."""
    from bench.compare.kernels import watched

    def generate() -> None:
        if len(request["prompts"]) > 1:
            adapter.generate_together(request["prompts"], request["tokens"])
        else:
            for _ in adapter.generate(request["prompts"][0], request["tokens"], False):
                pass

    return {"written_in": adapter.written_in, "kernels": watched(generate, adapter.kernel_names)}


def scored(adapter: Adapter, request: Reply) -> Reply:
    """Write the distributions after each prefix to a file, fp32 [prefixes, vocabulary]."""
    if not adapter.scoring:
        raise NotImplementedError("its adapter gives no distributions")
    import numpy

    rows = numpy.empty((len(request["prefixes"]), request["vocabulary"]), dtype=numpy.float32)
    for row, prefix in zip(rows, request["prefixes"], strict=True):
        values = numpy.asarray(adapter.distribution(prefix), dtype=numpy.float32)
        if values.size < row.size:
            raise RuntimeError(f"a distribution has {values.size} entries, the vocabulary {row.size}")
        row[:] = values[: row.size]  # an engine may pad its vocabulary
    numpy.save(request["path"], rows)
    return {"scoring": adapter.scoring}


def loaded(adapter: Adapter, request: Reply, packages: Sequence[str]) -> Reply:
    """Load the engine; what it chose and which versions it runs on."""
    spec = LoadSpec(**request["spec"])
    if spec.made_up and not adapter.makes_weights:
        raise NotImplementedError("its adapter makes up no weights, it reads a checkpoint")
    adapter.load(spec)
    return {
        "settings": adapter.settings(),
        "versions": versions(packages),
        "streaming": adapter.streaming,
        "written_in": adapter.written_in,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the distributions that are there."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(adapter: Adapter, request: Reply, packages: Sequence[str], clock: Clock = time.perf_counter) -> Reply:
    """Carry out one request; raises whatever the engine raises."""
    kind = request["op"]
    if kind == "load":
        return loaded(adapter, request, packages)
    if kind == "time":
        return timed(adapter, request, clock)
    if kind == "together":
        return timed_together(adapter, request, clock)
    if kind == "profile":
        return profiled(adapter, request)
    if kind == "score":
        return scored(adapter, request)
    if kind == "close":
        adapter.close()
        return {}
    raise ValueError(f"unknown request {kind!r}")


def take_over_stdio() -> tuple[BinaryIO, BinaryIO]:
    """(requests, replies): the real stdin and stdout, out of reach of anything that prints or reads, which gets stderr
    and nothing."""
    sys.stdout.flush()
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def die_with_parent() -> None:
    """A paused process would outlive a parent that was killed, and hold its GPU memory for ever (Linux only)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return


def missing_modules(required: Sequence[str]) -> list[str]:
    return [name for name in required if importlib.util.find_spec(name) is None]


def serve(
    requests: BinaryIO, replies: BinaryIO, make: Callable[[], Adapter], required: Sequence[str], packages: Sequence[str]
) -> None:
    """Answer requests until there are no more; `make` gives the adapter once what it requires is known to be there."""
    adapter: Adapter | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if adapter is None and (absent := missing_modules(required)):
                reply: Reply = {"missing": absent}
            else:
                adapter = adapter or make()
                reply = {"result": answer(adapter, request, packages)}
        except Exception as error:  # whatever it is, the report tells it
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    streams = take_over_stdio()
    die_with_parent()
    target, settings, required, packages = sys.argv[1:]
    serve(*streams, lambda: pkgutil.resolve_name(target)(**json.loads(settings)), names(required), names(packages))
    os._exit(0)  # an engine's own threads must not keep the process
