"""Which program is to be shown: the part of the command line that the drawing and the timeline share."""

from __future__ import annotations

import argparse

from models.command import add_model
from models.errors import UserError
from scheduler.buckets import BucketPrograms
from scheduler.build import DEFAULT_POLICY
from scheduler.costs import MACHINES
from scheduler.options import DEFAULT_CAPACITY, ITEMSIZES, cache_capacity, find_config
from scheduler.place import POLICIES
from scheduler.program import Program

DEFAULT_POSITION = 96


def add_program_options(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """Model, machine and position; the program is then the one that an engine would run there."""
    add_model(parser, required=model_required)
    parser.add_argument("--sms", type=int, default=132, help="streaming multiprocessors (default %(default)s)")
    parser.add_argument("--position", type=int, default=DEFAULT_POSITION, help="positions cached (default %(default)s)")
    parser.add_argument("--capacity", type=int, help=f"positions of the cache (default {DEFAULT_CAPACITY}, or the model's)")
    parser.add_argument("--policy", choices=list(POLICIES), default=DEFAULT_POLICY, help="placement (default %(default)s)")
    parser.add_argument("--dtype", choices=list(ITEMSIZES), default="bf16", help="weight type (default %(default)s)")
    parser.add_argument("--tail", action="store_true", help="only the last layer and the head: what prefill leaves")
    parser.add_argument("--machine", choices=list(MACHINES), default="h100", help="cost model (default %(default)s)")


def program_of(options: argparse.Namespace) -> Program:
    """The proven program, or its tail, that an engine would run at the position asked for."""
    config = find_config(options.model)
    if options.capacity is None and options.position >= DEFAULT_CAPACITY:
        capacity = min(options.position + 1, config.max_position)
    else:
        capacity = cache_capacity(config, options.capacity)
    if not 0 <= options.position < capacity:
        raise UserError(f"--position {options.position}: a cache of {capacity} positions serves 0 to {capacity - 1}")
    programs = BucketPrograms(config, options.sms, capacity, ITEMSIZES[options.dtype], options.policy)
    return programs.program(programs.place(options.position), options.tail)


def model_name(options: argparse.Namespace) -> str:
    """The model as it may stand in a file name."""
    name: str = options.model.rstrip("/").rpartition("/")[2]
    return name.replace(":", "-") or "model"
