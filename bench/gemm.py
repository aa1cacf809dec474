"""Microseconds of a product of 1 to 64 tokens with FP8 weights, beside cuBLAS, a plain Triton product and the read floor.

    python -m bench.gemm

The matrices are those of Llama 3 70B, with random weights; copies of a matrix take turns, so that none is found in L2.  All
are timed back to back in a CUDA graph.  Prints a table, writes a record and a picture, and ends with the record as one line of
JSON.  `--sweep` times every plan instead, and keeps nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import triton

from bench.decode import MOST_RUNS, ROOT, positions
from bench.decode_runs import data_sheet_bandwidth
from bench.gemm_chart import draw
from bench.gemm_runs import Operands, check, compile_all, measure_library, measure_plain, microseconds, our_way, read_floor
from bench.gemm_sweep import sweep
from bench.record import describe, gpu_state
from bench.record_file import make_folder, save_record
from bench.rig import device_sms
from megakernel.gemm.plan import MOST_TOKENS, Plan, Problem, choose_plan
from megakernel.loading import gpu_problem
from models.command import Parser, command, start, whole
from models.errors import UserError
from models.output import output_path

SHAPES = ((8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672))  # rows and columns: output, QKV, gate and up, down
TOKENS = (1, 2, 4, 8, 16, 32, 64)
RUNS = 7
WAYS = ("fp8", "fp8_early", "bf16", "bf16_early", "cublas_fp8", "cublas_fp8_rows", "cublas_bf16", "plain")


def shapes(text: str) -> list[tuple[int, int]]:
    """Rows by columns, separated by commas."""
    pairs = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
    if any(len(pair) != 2 or pair[1] % 256 or min(pair) < 256 for pair in pairs):
        raise ValueError(text)
    return [(rows, columns) for rows, columns in pairs]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.gemm", description="Microseconds of a product of few tokens with FP8 weights.")
    default = ",".join(f"{rows}x{columns}" for rows, columns in SHAPES)
    parser.add_argument("--shapes", type=shapes, default=list(SHAPES), help=f"rows x columns, of 256s (default {default})")
    default = ",".join(map(str, TOKENS))
    parser.add_argument("--tokens", type=positions, default=list(TOKENS), help=f"separated by commas (default {default})")
    parser.add_argument("--runs", type=whole(1, MOST_RUNS), default=RUNS, help="runs of each kind (default %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="time every plan, keep no record")
    parser.add_argument("--output", type=output_path, default=ROOT / "bench" / "results", help="folder (default %(default)s)")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


def check_request(options: argparse.Namespace) -> None:
    """Raises UserError where it cannot be met."""
    if (problem := gpu_problem()) is not None:
        raise UserError(f"{problem}: this benchmark needs a GPU")
    for tokens in options.tokens:
        if not 1 <= tokens <= MOST_TOKENS:
            raise UserError(f"--tokens {tokens}: use 1 to {MOST_TOKENS}")


def our_plans(tokens: int, rows: int, columns: int) -> dict[str, tuple[Plan, bool]]:
    """Our ways to compute a product: the plan, and whether the kernel may begin while the one before it ends."""
    narrow, wide = (Problem(tokens, rows, columns, wide) for wide in (False, True))
    sms = device_sms()
    return {
        "fp8": (choose_plan(narrow, sms), False),
        "fp8_early": (choose_plan(narrow, sms, early=True), True),
        "bf16": (choose_plan(wide, sms), False),
        "bf16_early": (choose_plan(wide, sms, early=True), True),
    }


def measure_shape(rows: int, columns: int, tokens: Sequence[int], runs: int) -> dict[str, Any]:
    """One matrix, as JSON-ready values."""
    operands = Operands.random(rows, columns)
    floor = read_floor(operands)
    floor_us = floor.best * 1e3 * operands.bytes / floor.bytes
    found: dict[str, Any] = {"rows": rows, "columns": columns, "floor_us": floor_us, "floor_way": floor.way, "tokens": {}}
    compile_all(operands, [way for m in tokens for way in our_plans(m, rows, columns).values()])
    halves = torch.stack([copy.to(torch.bfloat16) for copy in operands.w[:2]])
    for m in tokens:
        plans = our_plans(m, rows, columns)
        for each in plans.values():
            check(operands, *each)
        times = {name: microseconds(our_way(operands, *each), len(operands.w), runs) for name, each in plans.items()}
        times |= measure_library(operands, m, halves, runs)
        plain, times["plain"] = measure_plain(operands, m, runs)
        cuts = {"plain": plain} | {name: asdict(plan.cut) for name, (plan, _) in plans.items()}
        found["tokens"][str(m)] = {"cuts": cuts, "us": {name: asdict(times[name]) for name in WAYS if name in times}}
        print(line(found, m), flush=True)
    return found


def line(shape: dict[str, Any], tokens: int) -> str:
    """One number of tokens for people to read."""
    times = {name: spread["median"] for name, spread in shape["tokens"][str(tokens)]["us"].items()}
    rate = shape["rows"] * shape["columns"] / times["fp8"] / 1e6
    told = ", ".join(f"{name} {time:.1f}" for name, time in times.items())
    return (
        f"{shape['rows']}x{shape['columns']} {tokens:>2} tokens, µs: {told}; floor {shape['floor_us']:.1f}; fp8 {rate:.2f} TB/s"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the record."""
    machine = describe(ROOT, options.commit)
    record: dict[str, Any] = {
        "benchmark": "gemm",
        "model": "llama-3-70b",
        "command": ["python", "-m", "bench.gemm", *sys.argv[1:]],
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "data_sheet_bytes_per_second": data_sheet_bandwidth(machine["gpu"]),
        "clocks_before": gpu_state(),
        "shapes": [],
    }
    for rows, columns in options.shapes:
        record["shapes"].append(measure_shape(rows, columns, options.tokens, options.runs))
        torch.cuda.empty_cache()
    record["clocks_after"] = gpu_state()
    return record


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    check_request(options)
    if options.sweep:
        for rows, columns in options.shapes:
            sweep(rows, columns, options.tokens, options.runs)
        return 0
    make_folder(options.output)
    record = measure(options)
    save_record(record, options.output, draw)
    return 0


if __name__ == "__main__":
    start(main)
