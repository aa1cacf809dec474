"""Milliseconds a token at several context lengths, against the time in which this GPU can read the same bytes.

    python -m bench.decode --model random:llama-3.2-1b

Each context: 127 tokens from that position on, in launches as the engine issues them, back to back, timed by the GPU's own
events; at least five runs.  What the KV cache holds before them is noise of a trained model's scale: it takes the time that
real rows take.  Then the engine end to end, tokens on the host.  Prints a table, writes a record into bench/results, and
ends with the record as one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from bench.column_runs import measure_columns
from bench.decode_runs import PROMPT, ContextRecord, data_sheet_bandwidth, measure_context, measure_endurance, measure_engine
from bench.record import describe, gpu_state
from bench.record_file import make_folder, save_record
from bench.rig import Rig, device_sms
from megakernel.geometry import COPIES
from megakernel.gpu.backend import CHUNK
from megakernel.loading import gpu_problem
from megakernel.memory import check_memory, mend_of
from models.checkpoint import open_checkpoint
from models.command import Parser, add_formats, add_model, columns, command, real, start, whole
from models.config import SIZE_LIMIT
from models.errors import UserError
from models.formats import PLAIN_NAME
from models.output import output_path
from models.packed import PackedModel, pack
from models.random_weights import RandomWeights
from models.tape import TapeLayout
from scheduler.build import make_shape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CONTEXTS = (32, 96, 1024, 4096, 16384)
TOKENS = 127
RUNS = 5
MOST_RUNS, MOST_ENDURANCE = 1000, 10**9


def fitting_contexts(asked: Sequence[int] | None, tokens: int, longest: int) -> list[int]:
    """The contexts asked for, or those of the default that fit a model of `longest` positions; raises UserError."""
    most = longest - tokens - 1
    contexts = [context for context in CONTEXTS if context <= most] if asked is None else list(asked)
    if not contexts:
        raise UserError(f"no context of this model leaves room for {tokens} tokens: ask for fewer --tokens")
    for context in contexts:
        if not 0 <= context <= most:
            raise UserError(f"a context of {context} and {tokens} tokens do not fit this model: use 0 to {most}")
    return contexts


def table_line(record: ContextRecord) -> str:
    """One context for people to read."""
    share = "" if record.data_sheet_share is None else f", {record.data_sheet_share:.1%} of the data sheet"
    steps = record.ms_per_token
    return (
        f"context {record.context:>6}: {steps.median:.4f} ms a token ({steps.least:.4f} to {steps.most:.4f}), "
        f"{record.tokens_per_second:.0f} tokens/s; floor {record.floor_ms:.4f} ms ({record.floor_way}), "
        f"{record.times_floor:.3f} times the floor{share}"
    )


def positions(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def share(text: str) -> float:
    """A number from 0 to 1, 0 not included."""
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.decode", description="Milliseconds a token against the read floor.")
    add_model(parser, default="random:llama-3.2-1b")
    add_formats(parser)
    parser.add_argument("--contexts", type=positions, help=f"separated by commas (default {','.join(map(str, CONTEXTS))})")
    parser.add_argument("--tokens", type=whole(1, SIZE_LIMIT), default=TOKENS, help="tokens of a run (default %(default)s)")
    parser.add_argument("--runs", type=whole(1, MOST_RUNS), default=RUNS, help="runs of each kind (default %(default)s)")
    endurance = whole(0, MOST_ENDURANCE)
    parser.add_argument("--endurance", type=endurance, default=0, help="also decode so many tokens on end, watching for drift")
    parser.add_argument(
        "--columns", type=columns, help="SxD: a step of S sequences, or of D columns of one, beside one column; nothing else"
    )
    parser.add_argument("--right", type=share, default=0.7, help="of planted drafts with --columns (default %(default)s)")
    parser.add_argument(
        "--output", type=output_path, default=ROOT / "bench" / "results", help="folder of the record (default %(default)s)"
    )
    parser.add_argument(
        "--zipf",
        type=real(0.0, 10.0),
        default=0.0,
        help="exponent of Zipf's law by which random routers choose experts (default: evenly)",
    )
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


def load(options: argparse.Namespace) -> tuple[PackedModel, list[int]]:
    """The model, packed for the longest of the contexts; raises UserError or ScheduleError where the request
    cannot be met."""
    if (problem := gpu_problem()) is not None:
        raise UserError(f"{problem}: this benchmark needs a GPU")
    checkpoint = open_checkpoint(options.model)
    source = checkpoint.source
    if options.zipf:
        if not isinstance(source, RandomWeights) or not checkpoint.config.num_experts:
            raise UserError(f"{options.model} has no random router: leave --zipf out, or name a random model with experts")
        source = replace(source, zipf=options.zipf)
    tokens = options.tokens * (1 if options.columns is None else options.columns[1])
    contexts = fitting_contexts(options.contexts, tokens, checkpoint.config.max_position)
    capacity = max(max(contexts) + tokens + 1, PROMPT + 2)
    formats = checkpoint.chosen_formats(options.weights, options.head)
    if options.columns is not None:
        sequences, depth = options.columns
        make_shape(checkpoint.config, sms=1, capacity=1, bucket=1, formats=formats, sequences=sequences, depth=depth)
    weights = {"weights": TapeLayout.from_config(checkpoint.config, torch.bfloat16.itemsize, formats).bytes}
    check_memory(options.model, weights, torch.cuda.mem_get_info()[0], "GPU memory", mend_of(formats))
    return pack(source, checkpoint.config, torch.bfloat16, capacity, formats), contexts


def measure_rig(model: PackedModel, contexts: Sequence[int], options: argparse.Namespace, gpu: str | None) -> dict[str, Any]:
    """What is measured below the engine."""
    rig = Rig(model)
    rig.state.cache.normal_()
    measured = []
    for context in contexts:
        measured.append(measure_context(rig, context, options.tokens, options.runs, gpu))
        print(table_line(measured[-1]), flush=True)
    endurance = measure_endurance(rig, contexts[0], options.tokens, options.endurance) if options.endurance else None
    program = {
        "sms": device_sms(),
        "ring": rig.program(contexts[0]).program.ring,
        "policy": rig.programs.policy,
        "copies": COPIES,
        "tokens_a_launch": CHUNK,
        "capacity": model.capacity,
        "weights": rig.programs.formats.body,
        "head": rig.programs.formats.head,
    }
    return {"program": program, "contexts": [asdict(context) for context in measured], "endurance": endurance}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the record."""
    model, contexts = load(options)
    several = options.columns not in (None, (1, 1))
    machine = describe(ROOT, options.commit)
    record: dict[str, Any] = {
        "benchmark": "decode",
        "model": options.model,
        "formats": [name for name in dict.fromkeys(model.tape.formats) if name != PLAIN_NAME],
        "zipf": options.zipf,
        "command": ["python", "-m", "bench.decode", *sys.argv[1:]],
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "data_sheet_bytes_per_second": data_sheet_bandwidth(machine["gpu"]),
        "clocks_before": gpu_state(),
    }
    if several:
        steps = (options.tokens, options.runs, options.columns, options.right)
        record["columns"] = measure_columns(model, contexts, *steps)
        record["clocks_after"] = gpu_state()
        return record
    record |= measure_rig(model, contexts, options, machine["gpu"])
    record["clocks_after"] = gpu_state()
    gc.collect()  # what was measured below the engine, which a large model leaves no room beside
    torch.cuda.empty_cache()
    record["engine"] = engine = measure_engine(model, options.runs)
    steps, first = engine["ms_per_token"]["median"], engine["first_token_ms"]["median"]
    print(f"end to end: {steps:.4f} ms a token, {1e3 / steps:.0f} tokens/s; first token after {first:.2f} ms", flush=True)
    return record


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    make_folder(options.output)
    record = measure(options)
    save_record(record, options.output)
    return 0


if __name__ == "__main__":
    start(main)
