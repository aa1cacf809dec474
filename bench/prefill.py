"""Milliseconds to the first token over the prompt's length, and what prefill's kernels reach beside cuBLAS and SDPA.

    python -m bench.prefill --model random:llama-3.2-1b

First tokens go through the public engine, warm, the token on the host, nothing kept of the prompt; then a chat's second turn,
of which all but the new tokens is kept.  The kernels are timed apart by the GPU's own events, the libraries' in the same run.
Prints a table, writes a record and a picture, and ends with the record as one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch
import triton

from bench.decode import MOST_RUNS, ROOT, positions
from bench.prefill_chart import draw
from bench.prefill_runs import Kernels, as_json, first_tokens, measure_kernels
from bench.record import Spread, describe, gpu_state
from bench.record_file import make_folder, save_record
from bench.rig import Rig, device_sms, engine_of
from megakernel.loading import gpu_problem
from megakernel.prefill.plan import CHUNK, Plan
from models.checkpoint import open_checkpoint
from models.command import Parser, add_formats, add_model, command, start, whole
from models.errors import UserError
from models.formats import PLAIN_NAME
from models.output import output_path
from models.packed import PackedModel, pack

LENGTHS = (32, 128, 512, 1024, 2048, 4096, 16384)
RUNS = 7
FIRST_TURN, SECOND_TURN = 4000, 50  # tokens of a chat


def fitting_lengths(asked: list[int] | None, longest: int) -> list[int]:
    """The lengths asked for, or those of the default that fit a model of `longest` positions; raises UserError."""
    lengths = [length for length in LENGTHS if length < longest] if asked is None else asked
    if not lengths:
        raise UserError(f"no length of the default fits a model of {longest} positions: ask for --lengths")
    for length in lengths:
        if not 1 <= length < longest:
            raise UserError(f"a prompt of {length} tokens and its first do not fit this model: use 1 to {longest - 1}")
    return lengths


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.prefill", description="Milliseconds to the first token.")
    add_model(parser, default="random:llama-3.2-1b")
    add_formats(parser)
    default = ",".join(map(str, LENGTHS))
    parser.add_argument("--lengths", type=positions, help=f"of prompts, separated by commas (default {default})")
    parser.add_argument("--runs", type=whole(1, MOST_RUNS), default=RUNS, help="runs of each kind (default %(default)s)")
    parser.add_argument("--output", type=output_path, default=ROOT / "bench" / "results", help="folder (default %(default)s)")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


def load(options: argparse.Namespace) -> tuple[PackedModel, list[int]]:
    """The model, packed for the longest prompt; raises UserError where the request cannot be met."""
    if (problem := gpu_problem()) is not None:
        raise UserError(f"{problem}: this benchmark needs a GPU")
    checkpoint = open_checkpoint(options.model)
    lengths = fitting_lengths(options.lengths, checkpoint.config.max_position)
    capacity = min(checkpoint.config.max_position, max(*lengths, FIRST_TURN + SECOND_TURN) + 1)
    formats = checkpoint.chosen_formats(options.weights, options.head)
    if not Plan(checkpoint.config, device_sms(), capacity, formats).possible:
        raise UserError(f"{options.model} is not read by prefill: its prompts are decoded token by token")
    return pack(checkpoint.source, checkpoint.config, torch.bfloat16, capacity, formats), lengths


def first_line(length: int, spread: Spread) -> str:
    """One length for people to read."""
    return f"{length:>7} tokens: first token after {spread.median:.3f} ms ({spread.least:.3f} to {spread.most:.3f})"


def kernel_line(kernels: Kernels) -> str:
    """One chunk for people to read."""
    widening, experts = kernels.microseconds.get("widening"), kernels.experts
    return (
        f"{kernels.tokens:>7} tokens from {kernels.start}: projections {kernels.projections:.0f} TFLOP/s "
        f"(cuBLAS {kernels.cublas:.0f}), attention {kernels.attention:.0f} (SDPA {kernels.sdpa:.0f})"
        + ("" if widening is None else f", widening {widening:.1f} us a layer")
        + ("" if experts is None else f", {experts[0]} experts have rows, one {experts[1]}")
    )


def measure_engine(model: PackedModel, lengths: list[int], runs: int) -> dict[str, Any]:
    """First tokens through the public engine."""
    times: dict[str, Any] = {}
    record: dict[str, Any] = {"first_token_ms": times}
    with engine_of(model) as engine:
        for length in lengths:
            spread = first_tokens(engine, length, runs)
            print(first_line(length, spread), flush=True)
            times[str(length)] = asdict(spread)
        if model.capacity > FIRST_TURN + SECOND_TURN:
            spread = first_tokens(engine, FIRST_TURN + SECOND_TURN, runs, kept=FIRST_TURN)
            print(f"second turn, {SECOND_TURN} after {FIRST_TURN}: {spread.median:.3f} ms", flush=True)
            record["second_turn_ms"] = asdict(spread)
    return record


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the record."""
    model, lengths = load(options)
    record: dict[str, Any] = {
        "benchmark": "prefill",
        "model": options.model,
        "formats": [name for name in dict.fromkeys(model.tape.formats) if name != PLAIN_NAME],
        "command": ["python", "-m", "bench.prefill", *sys.argv[1:]],
        "machine": describe(ROOT, options.commit),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "clocks_before": gpu_state(),
        "capacity": model.capacity,
        **measure_engine(model, lengths, options.runs),
    }
    gc.collect()  # the engine, which a large model leaves no room beside
    torch.cuda.empty_cache()
    rig = Rig(model)
    rig.state.cache.normal_()
    chunks = [(max(0, length - CHUNK), min(length, CHUNK)) for length in lengths]
    measured = []
    for begin, tokens in chunks:
        measured.append(measure_kernels(rig, begin, tokens))
        print(kernel_line(measured[-1]), flush=True)
    record["kernels"] = as_json(measured)
    record["clocks_after"] = gpu_state()
    return record


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    make_folder(options.output)
    record = measure(options)
    save_record(record, options.output, draw)
    return 0


if __name__ == "__main__":
    start(main)
