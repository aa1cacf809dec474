"""How long the proof of a program takes, and how its time and memory grow with the number of instructions.

    python -m bench.check                    Llama-3.2-1B for 132 SMs, and 1 to 64 of its layers
    python -m bench.check --repeats 5 --layers 1 16

Every measurement is made in a process of its own that reads a saved program, as a user's would; the seconds are those of
`scheduler.check.check` alone, the median of some repeats.  The memory is the whole process's, Python and its libraries
included.  The bound for the 1B program is 5 s and 1 GB on a 2-core machine.  The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bench.pool import worker_pool
from bench.record import host, resident_bytes
from models.command import Parser, command, start, whole
from models.config import LAYER_LIMIT
from models.families import PRESETS
from scheduler.build import build_program, make_shape
from scheduler.check import check
from scheduler.program import read_program

MODEL = "llama-3.2-1b"
LAYERS = (1, 2, 4, 8, 16, 32, 64)
SMS = 132
CAPACITY = 4096
MOST_REPEATS = 1000
BOUND_SECONDS = 5.0
BOUND_BYTES = 10**9


@dataclass(frozen=True)
class CheckRecord:
    """One program's proof: median, fastest and slowest seconds; median seconds of processor time, which other work on the
    machine hardly changes; and the peak resident set of the process in bytes."""

    layers: int
    instructions: int
    counters: int
    seconds: float
    fastest: float
    slowest: float
    cpu_seconds: float
    peak_bytes: int


def measure(path: Path, layers: int, repeats: int) -> CheckRecord:
    """Check a saved program `repeats` times, in this process."""
    program = read_program(path)
    seconds, busy = [], []
    for _ in range(repeats):
        started, at_work = time.perf_counter(), time.process_time()
        report = check(program)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - at_work)
        if not report.valid:
            raise RuntimeError(f"{path}: {report.findings[0]}")
    times = (statistics.median(seconds), min(seconds), max(seconds), statistics.median(busy))
    return CheckRecord(layers, len(program.words), program.counters, *times, resident_bytes("VmHWM"))


def measure_apart(layers: int, repeats: int) -> CheckRecord:
    """Make a program of some layers, and measure its proof in a process of its own."""
    config = replace(PRESETS[MODEL], num_layers=layers)
    program = build_program(make_shape(config, sms=SMS, capacity=CAPACITY, bucket=CAPACITY), SMS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.program.npz"
        program.save(path)
        with worker_pool(1) as pool:
            return pool.apply(measure, (path, layers, repeats))


def growth(records: Sequence[CheckRecord]) -> float:
    """The exponent p of processor time ~ instructions^p, by least squares over the logarithms."""
    logs = np.log([[record.instructions, record.cpu_seconds] for record in records])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


HEADER = "layers  instructions  counters  seconds (fastest - slowest)  cpu seconds  cpu us/instruction  peak MB"


def row(record: CheckRecord) -> str:
    """One line of the table."""
    span = f"{record.seconds:.3f} ({record.fastest:.3f} - {record.slowest:.3f})"
    return (
        f"{record.layers:6}  {record.instructions:12}  {record.counters:8}  {span:>27}  {record.cpu_seconds:11.3f}  "
        f"{1e6 * record.cpu_seconds / record.instructions:18.1f}  {record.peak_bytes / 1e6:7.0f}"
    )


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit 1 where the 1B program is over its bound."""
    parser = Parser(prog="python -m bench.check", description="Time the proof of programs.")
    parser.add_argument("--repeats", type=whole(1, MOST_REPEATS), default=5, help="proofs per program (default %(default)s)")
    layers = whole(1, LAYER_LIMIT - 1)
    parser.add_argument("--layers", type=layers, nargs="+", default=list(LAYERS), help="layers of each program")
    options = parser.parse_args(arguments)
    print(f"{MODEL} shapes, {SMS} SMs, context bucket {CAPACITY}\n{HEADER}")
    records = []
    for layers in options.layers:
        records.append(measure_apart(layers, options.repeats))
        print(row(records[-1]))
    full = [record for record in records if record.layers == PRESETS[MODEL].num_layers]
    within = all(record.seconds <= BOUND_SECONDS and record.peak_bytes <= BOUND_BYTES for record in full)
    exponent = growth(records) if len(records) > 1 else None
    if exponent is not None:
        print(f"\nprocessor time grows as instructions ^ {exponent:.2f}")
    result = {
        "benchmark": "check",
        "model": MODEL,
        "sms": SMS,
        "records": [asdict(record) for record in records],
        "exponent": exponent,
        "bound_seconds": BOUND_SECONDS,
        "bound_bytes": BOUND_BYTES,
        "within_bound": within,
        **host(),
    }
    print(json.dumps(result))
    return 0 if within else 1


if __name__ == "__main__":
    start(main)
