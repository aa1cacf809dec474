"""How long it takes to make a program, from a model's numbers to proven words, and how much memory.

    python -m bench.schedule                        the three presets on 132 SMs
    python -m bench.schedule --models llama-3.2-1b --policies balanced --repeats 5

Every program is made in a process of its own.  "lower" is lowering, dependencies, placement, page plan and encoding;
"prove" is the checker.  The bound for Llama-3.2-1B on 132 SMs is 5 s for both together and 1 GB of memory, Python and its
libraries included, on a 2-core machine.  It is held against processor time: one thread does all the work, so that is the time
it takes on a machine with nothing else to do.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import networkx

from bench.pool import worker_pool
from bench.record import host, resident_bytes
from models.command import Parser, command, start, whole
from models.config import SIZE_LIMIT
from models.families import PRESETS
from scheduler.build import DEFAULT_POLICY, make_shape, schedule
from scheduler.check import require_valid
from scheduler.limits import MAX_SMS
from scheduler.place import POLICIES

BOUND_MODEL = "llama-3.2-1b"
BOUND_SECONDS = 5.0
BOUND_BYTES = 10**9
MOST_REPEATS = 1000


@dataclass(frozen=True)
class ScheduleRecord:
    """One program: medians over some repeats, in seconds; `cpu_seconds` is processor time, lowering and proof together."""

    model: str
    policy: str
    sms: int
    bucket: int
    instructions: int
    counters: int
    lower_seconds: float
    prove_seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def within_bound(self) -> bool:
        """Whether this program is made within the bound, which is set for one model."""
        return self.cpu_seconds <= BOUND_SECONDS and self.peak_bytes <= BOUND_BYTES


def measure(model: str, policy: str, sms: int, bucket: int, repeats: int) -> ScheduleRecord:
    """Make and prove one program `repeats` times, in this process."""
    lower, prove, busy = [], [], []
    for _ in range(repeats):
        at_work, begun = time.process_time(), time.perf_counter()
        program = schedule(make_shape(PRESETS[model], sms=sms, capacity=bucket, bucket=bucket), sms, policy, None)
        made = time.perf_counter()
        require_valid(program)
        prove.append(time.perf_counter() - made)
        lower.append(made - begun)
        busy.append(time.process_time() - at_work)
    return ScheduleRecord(
        model=model,
        policy=policy,
        sms=sms,
        bucket=bucket,
        instructions=len(program.words),
        counters=program.counters,
        lower_seconds=round(statistics.median(lower), 3),
        prove_seconds=round(statistics.median(prove), 3),
        cpu_seconds=round(statistics.median(busy), 3),
        peak_bytes=resident_bytes("VmHWM"),
    )


HEADER = "model          policy         instructions  counters  lower s  prove s  cpu s  peak MB"


def row(record: ScheduleRecord) -> str:
    """One line of the table."""
    return (
        f"{record.model:<13}  {record.policy:<13}  {record.instructions:12}  {record.counters:8}  {record.lower_seconds:7.2f}  "
        f"{record.prove_seconds:7.2f}  {record.cpu_seconds:5.2f}  {record.peak_bytes / 1e6:7.0f}"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m bench.schedule", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="presets")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=[DEFAULT_POLICY], help="placements")
    parser.add_argument("--sms", type=whole(1, MAX_SMS), default=132, help="SMs (default %(default)s)")
    parser.add_argument("--bucket", type=whole(1, SIZE_LIMIT), default=4096, help="most past positions (default %(default)s)")
    parser.add_argument("--repeats", type=whole(1, MOST_REPEATS), default=3, help="programs of each kind (default %(default)s)")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit 1 where the 1B program is over its bound."""
    options = parse_arguments(arguments)
    print(f"{options.sms} SMs, context bucket {options.bucket}\n{HEADER}")
    records = []
    for model in options.models:
        for policy in options.policies:
            with worker_pool(1) as pool:
                records.append(pool.apply(measure, (model, policy, options.sms, options.bucket, options.repeats)))
            print(row(records[-1]), flush=True)
    within = all(record.within_bound for record in records if record.model == BOUND_MODEL)
    result = {
        "benchmark": "schedule",
        "records": [asdict(record) for record in records],
        "bound_model": BOUND_MODEL,
        "bound_seconds": BOUND_SECONDS,
        "bound_bytes": BOUND_BYTES,
        "within_bound": within,
        **host(),
        "networkx": networkx.__version__,
    }
    print(json.dumps(result))
    return 0 if within else 1


if __name__ == "__main__":
    start(main)
