"""`python -m scheduler --model MODEL -o FILE`: make a program, prove it, save it; `--disassemble` prints it.

Only the model's configuration is needed, no weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from models.config import PRESETS, ModelConfig
from models.errors import UserError
from models.hf_config import read_config
from scheduler.build import DEFAULT_POLICY, build_program, make_shape
from scheduler.check import check
from scheduler.place import POLICIES

RANDOM = "random:"
ITEMSIZES = {"bf16": 2, "fp32": 4}
DEFAULT_CAPACITY = 4096


def find_config(model: str) -> ModelConfig:
    """The configuration of a preset, of `random:<preset>`, or of a directory with a `config.json`."""
    preset = PRESETS.get(model.removeprefix(RANDOM))
    if preset is not None:
        return preset
    if model.startswith(RANDOM) or not Path(model).exists():
        raise UserError(f"{model}: neither a directory nor a preset; the presets are {', '.join(PRESETS)}")
    return read_config(Path(model))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scheduler", description="Make a decode program and prove it.")
    parser.add_argument("--model", required=True, help="a preset, random:<preset>, or a directory with config.json")
    parser.add_argument("--sms", type=int, default=132, help="streaming multiprocessors (default %(default)s)")
    parser.add_argument("--capacity", type=int, help=f"positions of the KV cache (default {DEFAULT_CAPACITY}, or the model's)")
    parser.add_argument("--bucket", type=int, help="most past positions a token may have (default: the capacity)")
    parser.add_argument("--policy", choices=list(POLICIES), default=DEFAULT_POLICY, help="placement (default %(default)s)")
    parser.add_argument("--slices", type=int, help="attention slices (default: as many as the SMs can work on)")
    parser.add_argument("--ring", type=int, help="pages of the shared-memory ring (default: as many as fit)")
    parser.add_argument("--dtype", choices=list(ITEMSIZES), default="bf16", help="weight type (default %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="where to save the program")
    parser.add_argument("--disassemble", action="store_true", help="print every instruction")
    return parser


def run(options: argparse.Namespace) -> None:
    """Make, prove, save and print as asked."""
    config = find_config(options.model)
    capacity = min(DEFAULT_CAPACITY, config.max_position) if options.capacity is None else options.capacity
    shape = make_shape(
        config,
        sms=options.sms,
        capacity=capacity,
        bucket=capacity if options.bucket is None else options.bucket,
        itemsize=ITEMSIZES[options.dtype],
        slices=options.slices,
    )
    program = build_program(shape, options.sms, options.policy, options.ring)
    if options.output is not None:
        try:
            program.save(options.output)
        except OSError as error:
            raise UserError(f"{options.output}: cannot be written ({error.strerror})") from None
    if options.disassemble:
        print("\n".join(program.disassembly()), flush=True)
    else:
        print(f"{options.output or options.model}: {check(program).summary}")


def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where no program can be made."""
    try:
        run(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the listing has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
