"""How long a checkpoint takes to load and pack, and its peak of host memory against the bound that the loader promises.

    python -m bench.load --model DIR | HUB_ID | random:llama-3.2-1b
    python -m bench.load --model random:llama-3.2-1b --synthetic

The promise: beside what Python and its libraries take, at most the largest shard plus the packed weights. `--synthetic`
first writes the made-up weights as a sharded checkpoint of true shape, so that the bound shows without a download.
Knows nothing of devices: what is measured ends with a packed model in host memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors
import torch

from bench.pool import interrupts_held
from bench.record import resident_bytes
from models.checkpoint import Checkpoint, SafetensorsSource, open_checkpoint
from models.command import Parser, add_model, command, start, whole
from models.config import SIZE_LIMIT
from models.errors import UserError
from models.output import output_path
from models.packed import PackedModel, pack
from models.random_weights import random_config
from models.synthetic import write_synthetic
from models.weights import expected_tensors

MEGABYTE = 10**6
MOST_SHARD_MB = 10**6
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadRecord:
    """One measurement, in bytes and seconds.

    `peak_bytes` is the peak resident set less `baseline_bytes`, that of Python and its libraries before the model is
    opened; `bound_bytes` is `largest_shard_bytes` + `packed_bytes`.
    """

    model: str
    dtype: str
    open_seconds: float
    pack_seconds: float
    source_bytes: int
    largest_shard_bytes: int
    packed_bytes: int
    baseline_bytes: int
    peak_bytes: int
    bound_bytes: int
    within_bound: bool
    cpus: int
    machine: str
    python: str
    torch: str
    safetensors: str


def measure(model: str, dtype: str, capacity: int | None) -> LoadRecord:
    """Open and pack one model, in this process, which must not have held another: its peak would count."""
    baseline = resident_bytes("VmRSS")
    started = time.perf_counter()
    checkpoint = open_checkpoint(model)
    opened = time.perf_counter()
    capacity = min(checkpoint.config.max_position, 8192) if capacity is None else capacity
    packed = pack(checkpoint.source, checkpoint.config, DTYPES[dtype], capacity)
    done = time.perf_counter()
    peak = resident_bytes("VmHWM") - baseline
    shards = shard_bytes(checkpoint)
    bound = max(shards) + packed_bytes(packed)
    return LoadRecord(
        model=model,
        dtype=dtype,
        open_seconds=round(opened - started, 3),
        pack_seconds=round(done - opened, 3),
        source_bytes=sum(shards),
        largest_shard_bytes=max(shards),
        packed_bytes=packed_bytes(packed),
        baseline_bytes=baseline,
        peak_bytes=peak,
        bound_bytes=bound,
        within_bound=peak <= bound,
        cpus=len(os.sched_getaffinity(0)),
        machine=platform.machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        safetensors=safetensors.__version__,
    )


def shard_bytes(checkpoint: Checkpoint) -> list[int]:
    """The size of every shard; of every tensor for made-up weights, which come tensor by tensor."""
    if isinstance(checkpoint.source, SafetensorsSource):
        return [path.stat().st_size for path, _ in checkpoint.source.files]
    size = checkpoint.stored_dtype.itemsize
    return [size * torch.Size(shape).numel() for shape in expected_tensors(checkpoint.config).values()]


def packed_bytes(packed: PackedModel) -> int:
    return packed.weights.nbytes + packed.constants.nbytes + packed.rope.nbytes


def report(record: LoadRecord) -> None:
    """The figures against their bound, for people."""
    rate = record.source_bytes / record.pack_seconds / 1e9
    print(f"{record.model} as {record.dtype} on {record.cpus} CPUs, torch {record.torch}")
    print(f"  open and check  {record.open_seconds:9.3f} s")
    print(f"  read and pack   {record.pack_seconds:9.3f} s, {rate:.2f} GB/s")
    for what, size, remark in (
        ("packed", record.packed_bytes, ""),
        ("largest shard", record.largest_shard_bytes, ""),
        ("peak", record.peak_bytes, f", beside {record.baseline_bytes / MEGABYTE:.0f} MB of libraries"),
        ("bound", record.bound_bytes, ", kept" if record.within_bound else ", EXCEEDED"),
    ):
        print(f"  {what:<15} {size / MEGABYTE:9.1f} MB{remark}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bench.load", description=(__doc__ or "").split("\n")[0])
    add_model(parser, default="random:llama-3.2-1b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the packed weights")
    parser.add_argument(
        "--capacity", type=whole(1, SIZE_LIMIT), help="positions of the RoPE table (default: 8192, or the model's own limit)"
    )
    parser.add_argument("--synthetic", action="store_true", help="write a random:<preset> as a checkpoint first, and load that")
    parser.add_argument("--shard-mb", type=whole(1, MOST_SHARD_MB), default=1000, help="largest shard of --synthetic, in MB")
    parser.add_argument(
        "--directory", type=output_path, help="where --synthetic writes (default: the system's temporary directory)"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> LoadRecord:
    if not options.synthetic:
        return measure(options.model, options.dtype, options.capacity)
    config = random_config(options.model)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        arguments = (config, Path(directory), options.shard_mb * MEGABYTE)
        # in a process of its own, because the memory that writing takes would count towards the peak
        writer = multiprocessing.get_context("spawn").Process(target=write_synthetic, args=arguments)
        with interrupts_held():
            writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"{directory}: the synthetic checkpoint could not be written, see above; is the disk full?")
        record = measure(directory, options.dtype, options.capacity)
    return replace(record, model=f"{options.model} in shards of at most {options.shard_mb} MB")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the bound is kept, 1 when it is not, 2 for bad input."""
    record = run(parse_arguments(arguments))
    report(record)
    print(json.dumps(asdict(record)))
    return 0 if record.within_bound else 1


if __name__ == "__main__":
    start(main)
