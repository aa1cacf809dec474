"""TFLOP/s of the grouped product of mixtures of experts, beside PyTorch's, a loop of cuBLAS, and cuBLAS's dense rate.

    python -m bench.grouped

The experts of one layer of four models (DeepSeek-V3's, all 256, are 15 GB of gates and ups: it is part of --full), every way in
CUDA graphs, in turn in the same run, on random numbers.  Prints a table, writes a record and a picture, and ends with the
record as one line of JSON.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from itertools import groupby
from typing import Any

import torch
import triton

from bench.decode import ROOT
from bench.grouped_chart import draw
from bench.grouped_runs import FORMATS, LOADS, MODELS, Case, Result, as_json, measure, weights
from bench.record import describe, gpu_state
from bench.record_file import make_folder, save_record
from megakernel.loading import gpu_problem
from models.command import Parser, command, start
from models.errors import UserError
from models.output import output_path

TOKENS = (64, 256, 1024, 4096, 16384)
QUICK_TOKENS = (64, 1024, 4096)
MATRICES = ("gate_up", "down")


def cases(full: bool, format: str = "bf16") -> list[Case]:
    """All of them, or those of a minute: gate and up of balanced loads, and 4,096 tokens of the rest; without DeepSeek-V3's."""
    every = [Case(model, *rest, format) for model in MODELS for rest in combinations()]
    if full:
        return every
    return [
        case
        for case in every
        if case.experts.experts <= 128
        and case.tokens in QUICK_TOKENS
        and (case.tokens == 4096 or (case.matrix, case.load) == ("gate_up", "balanced"))
    ]


def combinations() -> list[tuple[str, str, int]]:
    """Matrix, load and tokens."""
    return [(matrix, load, tokens) for matrix in MATRICES for load in LOADS for tokens in TOKENS]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.grouped", description="TFLOP/s of the grouped product of mixtures of experts.")
    parser.add_argument("--full", action="store_true", help="every model, matrix, load and length (default: some, in a minute)")
    parser.add_argument("--format", choices=list(FORMATS), default="bf16", help="of x and the weights (default %(default)s)")
    parser.add_argument("--output", type=output_path, default=ROOT / "bench" / "results", help="folder (default %(default)s)")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


HEADER = (
    f"{'model':<14} {'matrix':<8} {'load':<9} {'tokens':>6} {'ours':>16} {'unbanded':>9} {'torch':>6} {'loop':>6} {'dense':>6}"
)


def line(result: Result) -> str:
    """One case for people to read: TFLOP/s at the median, ours also at the slowest and fastest."""
    case, rates, ours = result.case, result.rates, result.microseconds["ours"]
    slowest, fastest = (case.operations / microseconds / 1e6 for microseconds in (ours.most, ours.least))
    mine = f"{rates['ours']:.0f} ({slowest:.0f}-{fastest:.0f})"
    widths = {"unbanded": 9, "torch": 6, "loop": 6, "dense": 6}
    others = " ".join(f"{rates[way]:>{width}.0f}" if way in rates else f"{'-':>{width}}" for way, width in widths.items())
    return f"{case.experts.name:<14} {case.matrix:<8} {case.load:<9} {case.tokens:>6} {mine:>16} {others}"


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the record."""
    if (problem := gpu_problem()) is not None:
        raise UserError(f"{problem}: this benchmark needs a GPU")
    record: dict[str, Any] = {
        "benchmark": "grouped",
        "model": f"experts-{options.format}",
        "command": ["python", "-m", "bench.grouped", *sys.argv[1:]],
        "machine": describe(ROOT, options.commit),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "clocks_before": gpu_state(),
    }
    results = []
    begun = time.perf_counter()
    print(HEADER, flush=True)
    for (experts, matrix), group in groupby(cases(options.full, options.format), lambda case: (case.experts, case.matrix)):
        w = weights(experts, matrix, options.format)
        for case in group:
            results.append(measure(case, w))
            print(line(results[-1]), flush=True)
            torch.cuda.empty_cache()
        del w
    record["results"] = as_json(results)
    record["seconds"] = round(time.perf_counter() - begun, 1)
    record["clocks_after"] = gpu_state()
    return record


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    make_folder(options.output)
    record = measure_all(options)
    save_record(record, options.output, draw)
    return 0


if __name__ == "__main__":
    start(main)
