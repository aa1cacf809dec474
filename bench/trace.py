"""Trace decode steps on the GPU: time stamps of every instruction, and what taking them costs.

    python -m bench.trace --model random:llama-3.2-1b --position 96 -o trace
    python -m scheduler.timeline --trace trace/measured.npz -o trace

The first line writes `measured.npz` and `cost.json`, the second what docs/pictures.md shows.  Launches with and without the
trace take turns; the stamps kept are those of the last.  The KV cache holds noise, the tokens are random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.record import Spread, describe, gpu_state
from bench.rig import Rig
from megakernel.gpu.machine import GpuProgram
from megakernel.loading import gpu_problem
from models.checkpoint import open_checkpoint
from models.command import Parser, add_formats, add_model, command, start, whole
from models.config import SIZE_LIMIT
from models.errors import UserError, writing
from models.output import output_path, write_file
from models.packed import PackedModel, pack
from scheduler.options import DEFAULT_CAPACITY
from scheduler.timeline import Trace, measured_trace

ROOT = Path(__file__).resolve().parent.parent
MOST_RUNS = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.trace", description="Trace decode steps on the GPU.")
    add_model(parser, default="random:llama-3.2-1b")
    add_formats(parser)
    parser.add_argument("--position", type=whole(0, SIZE_LIMIT), default=96, help="of the first token (default %(default)s)")
    parser.add_argument("--tokens", type=whole(1, SIZE_LIMIT), default=8, help="tokens of a launch (default %(default)s)")
    parser.add_argument("--runs", type=whole(1, MOST_RUNS), default=9, help="launches of each kind (default %(default)s)")
    parser.add_argument("-o", "--output", type=output_path, default=Path("trace"), help="folder (default %(default)s)")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


def load(options: argparse.Namespace) -> PackedModel:
    """The model, with a KV cache of the usual size or as much as the trace needs; raises UserError for what cannot be."""
    if (problem := gpu_problem()) is not None:
        raise UserError(f"{problem}: this command needs a GPU")
    checkpoint = open_checkpoint(options.model)
    most, needed = checkpoint.config.max_position, options.position + options.tokens + 1
    if needed > most:
        raise UserError(f"position {needed - 1} is beyond the model's {most}: use a lower --position")
    formats = checkpoint.chosen_formats(options.weights, options.head)
    capacity = max(needed, min(DEFAULT_CAPACITY, most))
    return pack(checkpoint.source, checkpoint.config, torch.bfloat16, capacity, formats)


def alternate(runs: int, first: Callable[[], float], second: Callable[[], float]) -> tuple[Spread, Spread]:
    """What two measurements give that take turns, after one of each that does not count."""
    pairs = [(first(), second()) for _ in range(runs + 1)][1:]
    return Spread.of([a for a, _ in pairs]), Spread.of([b for _, b in pairs])


def measure(options: argparse.Namespace) -> tuple[Trace, dict[str, Any]]:
    """A trace, and the record of what it cost."""
    model = load(options)
    machine = describe(ROOT, options.commit)
    rig = Rig(model)
    rig.state.cache.normal_()
    position, tokens = options.position, options.tokens
    plain = rig.program(position)
    last = rig.programs.sizes[rig.programs.place(position)]
    if position + tokens > last + 1:
        raise UserError(f"a trace must stay in one context bucket, which here ends at {last}: use fewer --tokens")
    traced = GpuProgram(plain.program, rig.state, patience=rig.patience, trace_tokens=tokens)
    without, with_trace = alternate(
        options.runs,
        lambda: rig.timed([(plain, position, tokens)]),
        lambda: rig.timed([(traced, position, tokens)]),
    )
    trace = measured_trace(plain.program, traced.stamps(), past=position, machine=machine["gpu"] or "unknown GPU")
    return trace, {
        "benchmark": "trace",
        "model": options.model,
        "position": position,
        "tokens": tokens,
        "machine": machine,
        "clocks_after": gpu_state(),
        "ms_per_token": asdict(without),
        "traced_ms_per_token": asdict(with_trace),
        "cost": with_trace.median / without.median - 1,
    }


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    trace, record = measure(options)
    path = options.output / "measured.npz"
    with writing(path):
        trace.save(path)
        write_file(options.output / "cost.json", json.dumps(record, indent=1) + "\n")
    plain, traced = record["ms_per_token"]["median"], record["traced_ms_per_token"]["median"]
    print(f"a token takes {plain:.4f} ms, {traced:.4f} ms with the trace: {record['cost']:+.1%}")
    print(f"now: python -m scheduler.timeline --trace {path} -o {options.output}")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    start(main)
