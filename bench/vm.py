"""How long the CPU machine takes for a token, against the time it takes to read the weights of one.

    python -m bench.vm
    python -m bench.vm --model DIR | HUB_ID | random:<preset> --tokens 4

A token cannot take less than reading every streamed page once from memory; what is on top converts weights to fp32,
multiplies, and checks every access.  The promise is at most `--limit` seconds a token for the default, Llama-3.2-1B at its
true shape.  Knows nothing of GPUs.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence as Values
from dataclasses import asdict, dataclass

import torch

from megakernel.loading import DEFAULT_VM_SMS, DTYPES
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence
from megakernel.vm.backend import VmBackend
from models.checkpoint import open_checkpoint
from models.command import Parser, add_model, command, real, start, whole
from models.packed import PackedModel, pack
from models.tape import PAGE_BYTES
from scheduler.buckets import BucketPrograms
from scheduler.limits import MAX_SMS

CAPACITY = 128  # tokens: one KV page of the 1B shape
READS = 3
MOST_SECONDS = 1e6


@dataclass(frozen=True)
class VmRecord:
    """One measurement, in seconds: `token_seconds` is the median token, `cpu_seconds` what of it this process computed (less on
    a busy machine), `floor_seconds` reading its pages once.  `load_average` is that of the last minute before."""

    model: str
    dtype: str
    sms: int
    tokens: int
    streamed_bytes: int
    load_seconds: float
    schedule_seconds: float
    token_seconds: float
    cpu_seconds: float
    slowest_seconds: float
    floor_seconds: float
    limit_seconds: float
    within_limit: bool
    cpus: int
    load_average: float
    machine: str
    python: str
    torch: str


def read_seconds(model: PackedModel) -> float:
    """Time to read the pages that every token streams, once, on all threads: the median of READS."""
    words = model.weights[: model.tape.streamed_pages].view(torch.int64)
    times = []
    for _ in range(READS):
        started = time.perf_counter()
        words.sum()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def decode_seconds(backend: VmBackend, tokens: int) -> tuple[list[float], list[float]]:
    """Wall and CPU time of each of `tokens` tokens after a prompt of one; the first, which touches new memory, is left out."""
    backend.join(Sequence([0], tokens + 1, SamplingParams()))
    wall, cpu = [], []
    for _ in range(tokens + 1):
        started, computed = time.perf_counter(), time.process_time()
        backend.decode(1)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - computed)
    return wall[1:], cpu[1:]


def measure(model: str, dtype: str, sms: int, tokens: int, limit: float) -> VmRecord:
    """Load, schedule, decode and read."""
    load_average, started = os.getloadavg()[0], time.perf_counter()
    checkpoint = open_checkpoint(model)
    packed = pack(checkpoint.source, checkpoint.config, DTYPES[dtype], CAPACITY)
    loaded = time.perf_counter()
    backend = VmBackend(packed, BucketPrograms(checkpoint.config, sms, CAPACITY, packed.dtype.itemsize))
    backend.machine(0)
    scheduled = time.perf_counter()
    wall, cpu = decode_seconds(backend, tokens)
    return VmRecord(
        model=model,
        dtype=str(packed.dtype).removeprefix("torch."),
        sms=sms,
        tokens=tokens,
        streamed_bytes=packed.tape.streamed_pages * PAGE_BYTES,
        load_seconds=round(loaded - started, 3),
        schedule_seconds=round(scheduled - loaded, 3),
        token_seconds=round(statistics.median(wall), 4),
        cpu_seconds=round(statistics.median(cpu), 4),
        slowest_seconds=round(max(wall), 4),
        floor_seconds=round(read_seconds(packed), 4),
        limit_seconds=limit,
        within_limit=statistics.median(wall) <= limit,
        cpus=len(os.sched_getaffinity(0)),
        load_average=round(load_average, 2),
        machine=platform.machine(),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def report(record: VmRecord) -> None:
    """The figures against their floor and their limit, for people."""
    size, token, floor = record.streamed_bytes / 1e9, record.token_seconds, record.floor_seconds
    print(f"{record.model} as {record.dtype} on {record.sms} SMs, one of {record.cpus} CPUs, torch {record.torch}")
    print(f"  load and pack     {record.load_seconds:8.3f} s")
    print(f"  schedule          {record.schedule_seconds:8.3f} s")
    print(f"  a token           {token:8.3f} s, {size / token:.2f} GB/s; slowest {record.slowest_seconds:.3f} s")
    print(f"  of that, CPU time {record.cpu_seconds:8.3f} s, on a machine with a load of {record.load_average} before")
    print(f"  reading its pages {floor:8.3f} s, {size / floor:.2f} GB/s: the least it could take")
    print(f"  limit             {record.limit_seconds:8.3f} s{', kept' if record.within_limit else ', EXCEEDED'}")


def parse_arguments(arguments: Values[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bench.vm", description=(__doc__ or "").split("\n")[0])
    add_model(parser, default="random:llama-3.2-1b")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the packed weights")
    parser.add_argument("--sms", type=whole(1, MAX_SMS), default=DEFAULT_VM_SMS, help="SMs to schedule for")
    parser.add_argument("--tokens", type=whole(1, CAPACITY - 2), default=4, help=f"tokens to time, 1 to {CAPACITY - 2}")
    parser.add_argument("--limit", type=real(0.0, MOST_SECONDS), default=5.0, help="most seconds a token may take")
    return parser.parse_args(arguments)


@command
def main(arguments: Values[str] | None = None) -> int:
    """Exit status 0 when the limit is kept, 1 when it is not, 2 for bad input."""
    options = parse_arguments(arguments)
    record = measure(options.model, options.dtype, options.sms, options.tokens, options.limit)
    report(record)
    print(json.dumps(asdict(record)))
    return 0 if record.within_limit else 1


if __name__ == "__main__":
    start(main)
