"""`python -m scheduler --model MODEL -o FILE`: make a program, prove it, save it; `--disassemble` prints it.

Only the model's configuration is needed, no weights.
"""

from __future__ import annotations

import argparse

from models.command import Parser, add_formats, add_model, columns, command, start
from models.errors import writing
from models.formats import chosen_formats
from models.output import output_path, require_file
from scheduler.build import DEFAULT_POLICY, build_program, make_shape
from scheduler.check import check
from scheduler.options import DEFAULT_CAPACITY, ITEMSIZES, cache_capacity, find_config
from scheduler.place import POLICIES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m scheduler", description="Make a decode program and prove it.")
    add_model(parser, required=True)
    add_formats(parser)
    parser.add_argument("--sms", type=int, default=132, help="streaming multiprocessors (default %(default)s)")
    parser.add_argument("--capacity", type=int, help=f"positions of the KV cache (default {DEFAULT_CAPACITY}, or the model's)")
    parser.add_argument("--bucket", type=int, help="most past positions a token may have (default: the capacity)")
    parser.add_argument("--policy", choices=list(POLICIES), default=DEFAULT_POLICY, help="placement (default %(default)s)")
    parser.add_argument("--slices", type=int, help="attention slices (default: as many as the SMs can work on)")
    parser.add_argument("--tail", action="store_true", help="only the last layer and the head: what prefill leaves")
    parser.add_argument("--columns", type=columns, default=(1, 1), help="SxD: S sequences, or D columns of one (default 1x1)")
    parser.add_argument("--ring", type=int, help="pages of the shared-memory ring (default: as many as fit)")
    parser.add_argument("--dtype", choices=list(ITEMSIZES), default="bf16", help="weight type (default %(default)s)")
    parser.add_argument("-o", "--output", type=output_path, help="where to save the program")
    parser.add_argument("--disassemble", action="store_true", help="print every instruction")
    return parser


def run(options: argparse.Namespace) -> None:
    """Make, prove, save and print as asked."""
    config = find_config(options.model)
    capacity = cache_capacity(config, options.capacity)
    shape = make_shape(
        config,
        sms=options.sms,
        capacity=capacity,
        bucket=capacity if options.bucket is None else options.bucket,
        itemsize=ITEMSIZES[options.dtype],
        slices=options.slices,
        tail=options.tail,
        formats=chosen_formats(options.weights, options.head),
        sequences=options.columns[0],
        depth=options.columns[1],
    )
    if options.output is not None:
        with writing(options.output):
            require_file(options.output)
    program = build_program(shape, options.sms, options.policy, options.ring)
    if options.output is not None:
        with writing(options.output):
            program.save(options.output)
    if options.disassemble:
        print("\n".join(program.disassembly()), flush=True)
    else:
        print(f"{options.output or options.model}: {check(program).summary}")


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where no program can be made."""
    run(parser().parse_args(arguments))
    return 0


if __name__ == "__main__":
    start(main)
