"""What drafts are worth: tokens a second with them against without, on tasks that copy and on questions that do not.

    python -m bench.drafts                                        SmolLM2-135M-Instruct, on a Hopper GPU
    python -m bench.drafts --model DIRECTORY --tokens 128

Two engines on the same weights, one of which drafts, answer every prompt of `bench/draft_tasks.json` in turns, each in its chat
template, up to an end token or the limit; the texts must be the same, or it ends with an error.  Prints a line a prompt and one
a kind, writes a record into bench/results, and ends with the record as one line of JSON.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from bench.draft_runs import DraftBench, KindRecord, TaskRecord, summary
from bench.draft_tasks import KINDS, TASKS, Task, prompts_of, read_tasks
from bench.record import describe, gpu_state
from bench.record_file import make_folder, save_record
from megakernel.loading import columns_of, gpu_problem, load_engine
from megakernel.request import SamplingParams
from models.checkpoint import Checkpoint, open_checkpoint
from models.command import Parser, add_formats, add_model, command, real, start, whole
from models.config import SIZE_LIMIT
from models.errors import UserError
from models.formats import PLAIN_NAME
from models.output import output_path
from models.smollm2 import NAME, Unreachable, fetched

ROOT = Path(__file__).resolve().parent.parent
TOKENS, RUNS, SPECULATE = 256, 5, 7
MOST_RUNS = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m bench.drafts", description="Tokens a second with drafts against without.")
    add = parser.add_argument
    add_model(parser)
    add_formats(parser)
    add("--backend", choices=("gpu", "vm"), default="gpu", help="what decodes (default: %(default)s)")
    add("--speculate", type=whole(1, SPECULATE), default=SPECULATE, help="most drafts a step (default: %(default)s)")
    add("--tasks", type=Path, default=TASKS, help="the prompts (default: %(default)s)")
    add("--raw", action="store_true", help="prompts as they are, for models without a chat template")
    add("--tokens", type=whole(1, SIZE_LIMIT), default=TOKENS, help="of an answer at most (default: %(default)s)")
    add("--runs", type=whole(1, MOST_RUNS), default=RUNS, help="of each prompt with each engine (default: %(default)s)")
    add("--temperature", type=real(0.0, 2.0), default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of what is drawn (default: %(default)s)")
    add("--output", type=output_path, default=ROOT / "bench" / "results", help="folder of the record (default: %(default)s)")
    add("--commit", help="the commit measured, where git cannot tell")
    return parser


def chosen_checkpoint(options: argparse.Namespace) -> Checkpoint:
    """The model that was named, or SmolLM2; raises UserError for one that cannot draft."""
    if options.backend == "gpu" and (problem := gpu_problem()) is not None:
        raise UserError(f"{problem}: this benchmark needs a GPU, or --backend vm and much time")
    if options.model is None:
        try:
            options.model = str(fetched())
        except Unreachable as error:
            raise UserError(f"{NAME} cannot be fetched ({error}): name another --model") from None
    checkpoint = open_checkpoint(options.model)
    formats = checkpoint.chosen_formats(options.weights, options.head)
    if columns_of(options.speculate, options.backend, checkpoint.config, formats) == 1:
        raise UserError(f"{options.model}: with these weights this model decodes one token a step, name another")
    return checkpoint


def capacity_for(prompts: Sequence[Sequence[int]], tokens: int, longest: int) -> int:
    """Positions that hold every prompt and its answer; raises UserError where the model has fewer."""
    need = max(map(len, prompts)) + tokens
    if need > longest:
        raise UserError(f"prompts of up to {need - tokens} tokens and {tokens} more do not fit the model's {longest}: "
                        "ask for fewer --tokens")  # fmt: skip
    return need


def task_line(record: TaskRecord) -> str:
    """One prompt for people to read."""
    text = f"{record.name:>12}: {record.prompt:>4} and {record.tokens:>4} tokens, {record.tokens_per_step:.2f} tokens a step"
    if record.plain is None or record.drafted is None:
        return text + ", too short to be timed"
    return f"{text}, {record.drafted.median:.0f} tokens/s, {record.times_plain:.3f} times {record.plain.median:.0f}"


def kind_line(record: KindRecord) -> str:
    """One kind of prompts for people to read."""
    text = f"{record.kind}, {record.prompts} prompts, {record.timed} timed: {record.tokens_per_step:.2f} tokens a step"
    if record.times_plain is None:
        return text
    return (
        f"{text}, {record.drafted:.0f} tokens/s, {record.times_plain:.3f} times without drafts ({record.plain:.0f}); "
        f"from prompt to prompt {record.least:.3f} to {record.most:.3f}, standard deviation {record.deviation:.3f}"
    )


def measure(options: argparse.Namespace, checkpoint: Checkpoint, tasks: Sequence[Task]) -> dict[str, Any]:
    """Everything, as the record."""
    try:
        prompts = prompts_of(checkpoint, tasks, not options.raw)
    except UserError as error:
        if options.raw:
            raise
        raise UserError(f"the prompts do not go into this model's chat template ({error}): say --raw") from None
    capacity = capacity_for(prompts, options.tokens, checkpoint.config.max_position)
    stops = tuple(checkpoint.config.eos_token_ids)
    sampling = SamplingParams(temperature=options.temperature, seed=options.seed, stop_token_ids=stops)
    formats = checkpoint.chosen_formats(options.weights, options.head)
    record: dict[str, Any] = {
        "benchmark": "drafts",
        "model": options.model,
        "formats": [name for name in dict.fromkeys((formats.body, formats.head)) if name != PLAIN_NAME],
        "command": ["python", "-m", "bench.drafts", *sys.argv[1:]],
        "machine": describe(ROOT, options.commit),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "backend": options.backend,
        "speculate": options.speculate,
        "chat_template": not options.raw,
        "tokens": options.tokens,
        "runs": options.runs,
        "temperature": options.temperature,
        "seed": options.seed,
        "clocks_before": gpu_state(),
    }
    found = []
    given: dict[str, Any] = {"capacity": capacity, "weights": options.weights, "head": options.head, "checkpoint": checkpoint}
    with (
        load_engine(options.model, options.backend, **given) as plain,
        load_engine(options.model, options.backend, speculate=options.speculate, **given) as drafting,
    ):
        bench = DraftBench(plain, drafting, options.tokens, options.runs, sampling)
        for task, prompt in zip(tasks, prompts, strict=True):
            found.append(bench.measure(task, prompt))
            print(task_line(found[-1]), flush=True)
    kinds = [kind for name in KINDS if (kind := summary(found, name)) is not None]
    print(*map(kind_line, kinds), sep="\n", flush=True)
    record["clocks_after"] = gpu_state()
    return record | {"kinds": [asdict(kind) for kind in kinds], "tasks": [asdict(task) for task in found]}


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where the request cannot be met."""
    options = parser().parse_args(arguments)
    checkpoint, tasks = chosen_checkpoint(options), read_tasks(options.tasks)
    make_folder(options.output)
    save_record(measure(options, checkpoint, tasks), options.output)
    return 0


if __name__ == "__main__":
    start(main)
