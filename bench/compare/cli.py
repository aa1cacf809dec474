"""The command line of the comparison: what to run, where to write.

python -m bench.compare --write-random DIR --preset llama-3.2-1b     a checkpoint to compare on, without a download
python -m bench.compare --model DIR --output RESULTS                 the comparison
python -m bench.compare --merge A.json B.json --output RESULTS       one report of several records
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.compare.charts import draw
from bench.compare.engines import select
from bench.compare.merge import SCHEMA, merged
from bench.compare.plan import Plan
from bench.compare.prompts import Prompts, cut_prompts, draw_prompts
from bench.compare.report import report, summary
from bench.compare.session import Session
from models.command import INTERRUPTED, Parser, add_model, command, note, real, whole
from models.config import ModelConfig
from models.errors import UserError, writing
from models.families import PRESETS
from models.output import output_path, write_file

SCORED_PROMPTS, SCORED_LENGTH = 4, 32
SHARD_BYTES = 2 * 10**9
SECONDS = real(0.0, 1e7)
RECORD, REPORT = "comparison.json", "comparison.md"
MOST_BATCH = 64
QUICK = {"contexts": (32, 512), "tokens": 64, "repeats": 3, "scored_tokens": 8}

Record = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m bench.compare",
        description="Speed and fidelity of several engines on one checkpoint and one GPU.",
    )
    add = parser.add_argument
    add_model(parser)
    add("--engines", metavar="A,B", help="engines by name or module:Class (default: all; --quick: those that start fast)")
    add("--engine", action="append", default=[], metavar="NAME=PYTHON[:PATH]",
        help="the interpreter of an engine, and a folder for the front of its PYTHONPATH; may be repeated")  # fmt: skip
    add("--contexts", help=f"prompt lengths (default: {','.join(map(str, Plan.contexts))})")
    add("--tokens", type=int, help=f"tokens of a long generation (default: {Plan.tokens})")
    add("--batch", type=whole(1, MOST_BATCH), default=Plan.batch,
        help="prompts of each length decoded together (default: %(default)s)")  # fmt: skip
    add("--repeats", type=int, help=f"rounds (default: {Plan.repeats})")
    add("--quick", action="store_true", help="two short contexts, 3 rounds, engines that start fast")
    add("--text", type=Path, help="cut the prompts from this file (default: random ids)")
    add("--seed", type=whole(0, 2**63 - 1), default=Plan.seed, help="of the random ids (default: %(default)s)")
    add("--start-timeout", type=SECONDS, default=Plan.start_timeout, help="seconds for a start (default: %(default)s)")
    add("--timeout", type=SECONDS, default=Plan.timeout, help="seconds for anything else it is asked (default: %(default)s)")
    add("--time-limit", type=SECONDS, help="seconds after which no new round begins, scores and report included")
    add("--commit", help="the commit measured, where git cannot tell")
    add("--note", default="", help="a line for the record")
    add("--output", type=output_path, default=Path("comparison"), help="folder of record, report, charts and logs")
    add("--write-random", type=output_path, metavar="DIR", help="only write a checkpoint of made-up weights")
    add("--preset", choices=PRESETS, default="llama-3.2-1b", help="shape of --write-random (default: %(default)s)")
    add("--merge", type=Path, nargs="+", metavar="RECORD", help="only put records together, print and draw them")
    return parser.parse_args(arguments)


def write_random(directory: Path, preset: str) -> None:
    """A checkpoint of made-up bf16 weights at the true shape, as `models.random_weights` makes them."""
    from models.synthetic import write_synthetic  # here, because it imports torch

    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: is not empty, name a new folder")
    began = time.perf_counter()
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_synthetic(PRESETS[preset], directory, SHARD_BYTES)
    print(f"{directory}: {preset} written in {time.perf_counter() - began:.1f} s")


def make_plan(options: argparse.Namespace) -> Plan:
    """All checked numbers.  Raises UserError."""
    from models.checkpoint import RANDOM_PREFIX, open_checkpoint  # here, because it imports torch

    checkpoint = open_checkpoint(options.model)
    directory, made_up = checkpoint.directory, ""
    if directory is None and str(options.model).startswith(RANDOM_PREFIX):
        directory, made_up = options.output / "model", str(options.model)
    if directory is None:
        raise UserError(f"{options.model}: engines need files in Hugging Face's layout, give such a directory")
    quick = QUICK if options.quick else {}
    plan = Plan(
        directory.resolve(),
        checkpoint.config,
        Prompts((), ()),
        seed=options.seed,
        start_timeout=options.start_timeout,
        timeout=options.timeout,
        time_limit=options.time_limit,
        batch=options.batch,
        made_up=made_up,
        commit=options.commit,
    )
    given = {"tokens": options.tokens, "repeats": options.repeats, "contexts": split_contexts(options.contexts)}
    plan = replace(plan, **{**quick, **{key: value for key, value in given.items() if value is not None}})
    if plan.tokens < 2 or plan.repeats < 1:
        raise UserError(f"--tokens {plan.tokens} --repeats {plan.repeats}: at least 2 tokens and 1 round, please")
    longest = max(plan.contexts) + plan.tokens
    if longest > checkpoint.config.max_position:
        raise UserError(f"a prompt of {max(plan.contexts)} and {plan.tokens} tokens are more than the model's "
                        f"{checkpoint.config.max_position} positions: ask for less")  # fmt: skip
    return replace(plan, prompts=make_prompts(plan, options.text))


def make_prompts(plan: Plan, text: Path | None) -> Prompts:
    config: ModelConfig = plan.config
    length = min(SCORED_LENGTH, config.max_position - plan.scored_tokens)
    lengths = [context for context in plan.contexts for _ in range(plan.batch)]
    if text is None:
        return draw_prompts(config, lengths, SCORED_PROMPTS, length, plan.seed)
    return cut_prompts(config, plan.model, text, lengths, SCORED_PROMPTS, length)


def split_contexts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        contexts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--contexts {text}: write whole numbers with commas, such as 32,512") from None
    if contexts[0] < 2:
        raise UserError(f"--contexts {text}: a prompt has at least 2 tokens")
    return contexts


def write(record: Record, folder: Path) -> None:
    """The record and the report."""
    text = json.dumps({**record, "summary": summary(record)})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / RECORD, text + "\n")
        write_file(folder / REPORT, report(record))


def compare(options: argparse.Namespace) -> Record:
    """Run everything; the finished record is on disk as well."""
    specs = select(options.engines, options.engine, options.quick)
    plan = make_plan(options)
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    if plan.made_up:
        from models.synthetic import write_config  # here, because it imports torch

        with writing(plan.model):
            plan.model.mkdir(parents=True, exist_ok=True)
            write_config(plan.config, plan.model)
    began = time.monotonic()

    def say(text: str) -> None:
        note(f"{time.monotonic() - began:6.0f} s  {text}")

    def save(run: Record) -> None:
        run["command"] = ["python", "-m", "bench.compare", *sys.argv[1:]]
        run["note"], run["seconds"] = options.note, time.monotonic() - began
        write({"schema": SCHEMA, "runs": [run]}, options.output)

    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        run = Session(plan, specs, folder, say, save).run()
    finally:
        keep_logs(folder, options.output / "logs")
    return {"schema": SCHEMA, "runs": [run]}


def keep_logs(folder: Path, logs: Path) -> None:
    """What the engines printed, into the output; the rest of the folder goes."""
    logs.mkdir(exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, logs / log.name)
    shutil.rmtree(folder, ignore_errors=True)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when at least one engine was measured, 1 when none was, 2 for bad input, 130 for an interrupt."""
    options = parse_arguments(arguments)
    try:
        if options.write_random is not None:
            write_random(options.write_random, options.preset)
            return 0
        if options.merge:
            record = merged(options.merge)
        elif options.model:
            record = compare(options)
        else:
            raise UserError("give --model DIR, --write-random DIR or --merge RECORD...")
        write(record, options.output)
        print(report(record), flush=True)
        with writing(options.output):
            draw(record, options.output)
    except KeyboardInterrupt:
        note(f"interrupted: what was measured is in {options.output}")
        return INTERRUPTED
    measured = summary(record)["rows"]
    medians = {row["name"]: {entry["context"]: entry["step"]["median"] for entry in row["speeds"]} for row in measured}
    whole_rates = {row["name"]: {entry["context"]: entry["whole"]["median"] for entry in row["speeds"]} for row in measured}
    figures = {"milliseconds_per_token": medians, "tokens_per_second_whole": whole_rates}
    print(json.dumps({**figures, "record": str(options.output / RECORD)}))
    return 0 if measured else 1
