"""Compare placement policies by simulation, with no GPU: predicted step time, idle time and balance of a program.

    python -m scheduler.simulate --model llama-3.2-1b --sms 132 --position 96
    python -m scheduler.simulate --model llama-3-8b --machine h200 --policies balanced zigzag --bandwidth 4.0e12

The cost model is stated in docs/scheduler.md; `--bandwidth`, `--copies` and `--signal` change it.  Idle times are means over
the SMs, a step, by cause: waiting for a counter, waiting for a page, done with the queue.  What is printed are predictions;
they stand beside no measurement.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from models.command import Parser, add_model, command, start
from models.errors import UserError
from scheduler.buckets import BucketPrograms
from scheduler.build import schedule
from scheduler.costs import MACHINES, MachineModel
from scheduler.graph import critical_path
from scheduler.options import DEFAULT_CAPACITY, ITEMSIZES, find_config
from scheduler.place import POLICIES
from scheduler.program import Program
from scheduler.simulate import simulate

SENSIBLE = {"bandwidth": (1e6, 1e18), "copies": (1, 10**6), "signal": (1e-12, 1.0)}  # beyond, a float overflows


@dataclass(frozen=True)
class Prediction:
    """One policy's program.  Times in microseconds a step, idle times means over the SMs; `imbalance` is the bytes of the SM
    with most over the mean; `chain_us` is the critical path, which no step can beat."""

    policy: str
    step_us: float
    idle_us: float
    idle_counter_us: float
    idle_page_us: float
    idle_done_us: float
    most_idle_us: float
    chain_us: float
    terabytes_per_s: float
    imbalance: float
    simulation_s: float


def imbalance(program: Program, past: int) -> float:
    """Bytes that the busiest SM streams, over the mean."""
    streamed = [sum(item.instruction.cost(program.shape, past).bytes for item in queue) for queue in program.decoded]
    return max(streamed) * len(streamed) / sum(streamed)


def predict(program: Program, past: int, model: MachineModel) -> Prediction:
    """Simulate one program."""
    begun = time.perf_counter()
    result = simulate(program, past, model)
    took = time.perf_counter() - begun
    chain, _ = critical_path(program, past, model)
    return Prediction(
        policy=program.policy,
        step_us=1e6 * result.step_time,
        idle_us=1e6 * float(result.idle.mean()),
        idle_counter_us=1e6 * float(result.idle_counter.mean()),
        idle_page_us=1e6 * float(result.idle_page.mean()),
        idle_done_us=1e6 * float(result.idle_done.mean()),
        most_idle_us=1e6 * float(result.idle.max()),
        chain_us=1e6 * chain,
        terabytes_per_s=result.bandwidth / 1e12,
        imbalance=imbalance(program, past),
        simulation_s=took,
    )


COLUMNS = "policy         step us  idle us  counter  page  done  most idle  chain us   TB/s  bytes max/mean"


def row(prediction: Prediction) -> str:
    """One line of the table."""
    p = prediction
    idle = f"{p.idle_us:7.1f}  {p.idle_counter_us:7.1f}  {p.idle_page_us:4.0f}  {p.idle_done_us:4.0f}  {p.most_idle_us:9.1f}"
    return f"{p.policy:<13}  {p.step_us:7.1f}  {idle}  {p.chain_us:8.1f}  {p.terabytes_per_s:5.3f}  {p.imbalance:14.4f}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the cost model's own numbers are the defaults."""
    model = MachineModel()
    parser = Parser(prog="python -m scheduler.simulate", description=(__doc__ or "").split("\n")[0])
    add_model(parser, default="random:llama-3.2-1b")
    parser.add_argument("--sms", type=int, default=132, help="streaming multiprocessors (default %(default)s)")
    parser.add_argument("--position", type=int, default=96, help="cached positions (default %(default)s)")
    parser.add_argument("--dtype", choices=list(ITEMSIZES), default="bf16", help="weight type (default %(default)s)")
    parser.add_argument(
        "--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="placements (default: all)"
    )
    parser.add_argument("--machine", choices=list(MACHINES), default=model.name, help="cost model (default %(default)s)")
    parser.add_argument("--bandwidth", type=float, help="bytes a second of HBM, in place of the machine's")
    parser.add_argument("--copies", type=int, help=f"copies in flight an SM, in place of the machine's ({model.copies})")
    parser.add_argument("--signal", type=float, help=f"seconds of a signal, in place of the machine's ({model.signal})")
    return parser.parse_args(arguments)


def machine_of(options: argparse.Namespace) -> MachineModel:
    """The machine asked for, with the numbers given in place of its own."""
    changes = {name: value for name in ("bandwidth", "copies", "signal") if (value := getattr(options, name)) is not None}
    for name, value in changes.items():
        if not value > 0:
            raise UserError(f"--{name} {value}: use a number above 0")
        least, most = SENSIBLE[name]
        if not least <= value <= most:
            raise UserError(f"--{name} {value}: use {least:g} to {most:g}")
    return replace(MACHINES[options.machine], **changes)


def run(options: argparse.Namespace) -> None:
    """Predict and print."""
    config, model, position = find_config(options.model), machine_of(options), options.position
    capacity = min(max(DEFAULT_CAPACITY, position + 1), config.max_position)
    if not 0 <= position < capacity:
        raise UserError(f"--position {position}: this model has positions 0 to {config.max_position - 1}")
    buckets = BucketPrograms(config, options.sms, capacity, ITEMSIZES[options.dtype])
    shape = buckets.shape(buckets.sizes[buckets.place(position)])
    machine = f"{options.sms} SMs of an {model.name} model"
    print(f"{options.model} on {machine}, position {position}, bucket {shape.bucket}: predictions")
    print(COLUMNS)
    predictions = []
    for policy in options.policies:
        predictions.append(predict(schedule(shape, options.sms, policy, None), position, model))
        print(row(predictions[-1]), flush=True)
    best = min(predictions, key=lambda prediction: prediction.step_us)
    result = {
        "benchmark": "simulate",
        "kind": "prediction",
        "model": options.model,
        "sms": options.sms,
        "position": position,
        "bucket": shape.bucket,
        "slices": shape.slices,
        "machine": asdict(model),
        "best": best.policy,
        "predictions": [asdict(prediction) for prediction in predictions],
    }
    print(json.dumps(result))


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2, with one line, for a request that makes no sense."""
    run(parse_arguments(arguments))
    return 0


if __name__ == "__main__":
    start(main)
