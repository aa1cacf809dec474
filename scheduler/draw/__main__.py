"""`python -m scheduler.draw --model MODEL`: the schedule as a page for a browser, an SVG file and a DOT file."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.command import Parser, command, start
from models.errors import writing
from models.output import output_path, write_file
from scheduler.costs import MACHINES
from scheduler.draw.content import make_drawing
from scheduler.draw.dot import dot
from scheduler.draw.options import add_program_options, model_name, program_of
from scheduler.draw.page import page
from scheduler.draw.svg import svg

WRITERS = {"html": page, "svg": svg, "dot": dot}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m scheduler.draw", description="Draw a decode program: a page that opens offline, an SVG and a DOT file."
    )
    add_program_options(parser)
    parser.add_argument("--layer", type=int, help="draw this layer alone")
    parser.add_argument("-o", "--output", type=output_path, default=Path("drawing"), help="folder (default %(default)s)")
    return parser


def run(options: argparse.Namespace) -> list[Path]:
    """Write the three files; returns their paths."""
    name = f"{model_name(options)}-{options.sms}sms" + ("" if options.layer is None else f"-layer{options.layer}")
    program = program_of(options)
    title = f"{model_name(options)} on {options.sms} SMs" + ("" if options.layer is None else f", layer {options.layer}")
    drawing = make_drawing(title, program, options.position, MACHINES[options.machine], options.layer)
    written = []
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        for suffix, text in WRITERS.items():
            written.append(options.output / f"{name}.{suffix}")
            write_file(written[-1], text(drawing))
    return written


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where nothing can be drawn."""
    for path in run(parser().parse_args(arguments)):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    start(main)
