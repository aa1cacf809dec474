"""`python -m scheduler.timeline --model MODEL -o FOLDER`: the timeline of a step, and where its time goes.

From the simulator, or with `--trace FILE` from what a kernel wrote (`Trace.save`), then side by side with the simulator.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from models.command import Parser, command, start, whole
from models.errors import UserError, writing
from models.output import output_path, write_file
from scheduler.costs import MACHINES
from scheduler.draw.options import add_program_options, model_name, program_of
from scheduler.timeline.anatomy import json_report, text_report
from scheduler.timeline.chrome import write_chrome
from scheduler.timeline.compare import comparison, comparison_lines
from scheduler.timeline.picture import Window, write_picture
from scheduler.timeline.simulated import simulated_trace
from scheduler.timeline.trace import Trace, load_trace

MOST_TOKENS = 100  # to simulate: each takes a megabyte, and about a second of a large model


def window(text: str) -> Window:
    """ "200:300", microseconds of the step."""
    start, colon, stop = text.partition(":")
    if not colon:
        raise ValueError(text)
    return Window(float(start or 0), float(stop) if stop else None)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m scheduler.timeline", description="Show where the time of a decode step goes: simulated, or measured."
    )
    add_program_options(parser, model_required=False)
    parser.add_argument("--trace", type=Path, help="a measured trace, in place of --model and what goes with it")
    parser.add_argument("--tokens", type=whole(0, MOST_TOKENS), default=3, help="tokens to simulate (default %(default)s)")
    parser.add_argument("--window", type=window, default=Window(), metavar="US:US", help="part of the step in the picture")
    parser.add_argument("--path", action="store_true", help="draw the critical path into the picture")
    parser.add_argument("-o", "--output", type=output_path, default=Path("timeline"), help="folder (default %(default)s)")
    return parser


def write_all(trace: Trace, title: str, options: argparse.Namespace) -> str:
    """Timeline, picture and tables of one trace; returns the text of the tables."""
    folder, name, token = options.output, trace.source, trace.tokens - 1
    title = f"{title}: {name}, {trace.machine}"
    write_chrome(folder / f"{name}-timeline.json", trace, [token])
    write_picture(folder / f"{name}-timeline.png", title, trace, token, options.window, options.path)
    report = text_report(trace)
    write_file(folder / f"{name}-anatomy.txt", report)
    write_file(folder / f"{name}-anatomy.json", json.dumps(json_report(trace), indent=1) + "\n")
    return report


def run(options: argparse.Namespace) -> str:
    """Write everything that was asked for; returns what is to be printed."""
    model = MACHINES[options.machine]
    options.output.mkdir(parents=True, exist_ok=True)
    if options.trace is None:
        if options.model is None:
            raise UserError("say --model MODEL to simulate, or --trace FILE to look at a measurement")
        program, position = program_of(options), options.position
        title = f"{model_name(options)}, position {position}, {program.sms} SMs"
        return write_all(simulated_trace(program, position, model, options.tokens), title, options)
    measured = load_trace(options.trace)
    position = measured.position(measured.tokens - 1)
    predicted = simulated_trace(measured.program, position, model, options.tokens)
    title = f"{options.trace.stem}, position {position}, {measured.program.sms} SMs"
    report = write_all(measured, title, options)
    write_all(predicted, title, options)
    found = comparison(predicted, measured)
    lines = "\n".join(comparison_lines(found)) + "\n"
    write_file(options.output / "comparison.txt", lines)
    write_file(options.output / "comparison.json", json.dumps(found, indent=1) + "\n")
    return f"{report}\n{lines}"


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where nothing can be shown."""
    options = parser().parse_args(arguments)
    with writing(options.output):
        report = run(options)
    print(report, end="")
    return 0


if __name__ == "__main__":
    start(main)
