"""From a model to a finished program: lower, derive, place, plan pages, serialise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from instructions.codec import WORDS, Scheduled, encode
from instructions.shape import HELD_PAGES, MMA_COLUMNS, Shape, ceil_div, next_power_of_two
from models.config import ModelConfig
from models.families import family_of
from models.formats import FORMATS, PLAIN, PLAIN_NAME, Formats, check_formats
from scheduler.check import require_valid
from scheduler.dependencies import derive
from scheduler.errors import ScheduleError
from scheduler.level import level_head
from scheduler.limits import MAX_SMS
from scheduler.lower import lower
from scheduler.pages import plan_pages, ring_depth
from scheduler.place import POLICIES
from scheduler.program import Program, read_program

DEFAULT_POLICY = "balanced"
MAX_SLICES = MAX_SMS  # more than one a SM are never of use
COLUMNS = (1, 2, 4, 8)
MOST_QUERIES = 32  # of one KV head in a step: what the registers of the kernel hold
SLICE_PAGES = 4  # K pages of an attention slice, at least, where the context has so many


def attention_slices(config: ModelConfig, sms: int, bucket_pages: int) -> int:
    """How many slices the context is split into: a few pages each at the bucket's end, one slice a SM at most.

    Fewer pages a slice would spread the work wider, but every slice costs its readers time (docs/notebook/attention.md).
    """
    return max(1, min(sms // config.num_kv_heads, ceil_div(bucket_pages, SLICE_PAGES)))


def alone(config: ModelConfig, formats: Formats) -> str | None:
    """Why a model's programs have one column, or None."""
    if config.num_experts:
        return "experts, which each token chooses for itself"
    if any(linear.norms_together for linear in family_of(config).layer.linears):
        return "queries that are normed together"
    if one := [name for name in formats if name != PLAIN_NAME and not FORMATS[name].several]:
        return f"weights in {one[0]}, whose groups are multiplied for one column at a time"
    return None


def most_depth(config: ModelConfig, formats: Formats) -> int:
    """The most columns of one sequence: so many that the queries of a KV head fit a step's attention; 1 where there are no
    programs of several columns."""
    if alone(config, formats) is not None:
        return 1
    return max(1, min(MMA_COLUMNS, MOST_QUERIES // next_power_of_two(config.group)))


def most_sequences(config: ModelConfig, formats: Formats) -> int:
    """The most sequences that share a step; 1 where there are no programs of several columns."""
    return MMA_COLUMNS if alone(config, formats) is None else 1


def column_problem(shape: Shape) -> str | None:
    """Why there is no program with so many columns, or None."""
    sequences, depth = shape.sequences, shape.depth
    if sequences < 1 or depth < 1 or shape.columns > MMA_COLUMNS:
        return f"{sequences} sequences of {depth} columns; a step has 1 to {MMA_COLUMNS} columns in all"
    if sequences > 1 and depth > 1:
        return f"{sequences} sequences of {depth} columns; use several of one, or several sequences of one column"
    if sequences not in COLUMNS or depth not in COLUMNS:
        return f"{sequences} sequences of {depth} columns; use {', '.join(map(str, COLUMNS))}"
    if shape.columns > 1 and (why := alone(shape.config, shape.formats)) is not None:
        return f"{sequences} sequences of {depth} columns for a model with {why}; it has programs of one column only"
    if depth > (most := most_depth(shape.config, shape.formats)):
        return f"{depth} columns of a sequence; this model's attention takes at most {most}"
    return f"a tail of {shape.columns} columns; it is for one token" if shape.tail and shape.columns > 1 else None


def make_shape(
    config: ModelConfig,
    *,
    sms: int,
    capacity: int,
    bucket: int,
    itemsize: int = 2,
    slices: int | None = None,
    tail: bool = False,
    formats: Formats = PLAIN,
    sequences: int = 1,
    depth: int = 1,
) -> Shape:
    """The shape of a program, with `tail` of one that ends a prompt; of several `sequences`, or of `depth` columns of one.

    `capacity` and `bucket` are rounded up to whole KV pages.
    """
    if not 1 <= sms <= MAX_SMS:
        raise ScheduleError(f"{sms} SMs asked for; a program can be made for 1 to {MAX_SMS}")
    if itemsize not in (2, 4):
        raise ScheduleError(f"weights of {itemsize} bytes; use 2 (bf16) or 4 (fp32)")
    check_formats(formats, itemsize)
    if not 1 <= bucket <= capacity:
        raise ScheduleError(f"a context bucket of {bucket} positions in a KV cache of {capacity}; use 1 to {capacity}")
    page = Shape(config, itemsize, capacity, bucket, 1).page_positions
    capacity, bucket = (ceil_div(positions, page) * page for positions in (capacity, bucket))
    if slices is None:
        slices = attention_slices(config, sms, bucket // page)
    if not 1 <= slices <= MAX_SLICES:
        raise ScheduleError(f"{slices} attention slices; use 1 to {MAX_SLICES}")
    shape = Shape(config, itemsize, capacity, bucket, slices, tail, formats, sequences, depth)
    if problem := column_problem(shape):
        raise ScheduleError(problem)
    return shape


def build_program(shape: Shape, sms: int, policy: str = DEFAULT_POLICY, ring: int | None = None) -> Program:
    """Schedule one decode token of `shape` on `sms` SMs, and prove the result.

    `ring` pages of shared memory, as many as fit by default.  Raises ScheduleError where no program can be made.
    """
    program = schedule(shape, sms, policy, ring)
    require_valid(program)
    return program


def schedule(shape: Shape, sms: int, policy: str, ring: int | None) -> Program:
    """`build_program` without the proof."""
    if policy not in POLICIES:
        raise ScheduleError(f"unknown placement policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if ring is not None and ring < HELD_PAGES:
        raise ScheduleError(f"a ring of {ring} pages; use at least {HELD_PAGES}, which an instruction may hold at once")
    program = lower(shape, sms)
    deps = derive(program, shape)
    queues = POLICIES[policy](program, shape, deps, sms)
    program = level_head(program, shape, queues)
    plan = plan_pages(program, shape, deps, queues, ring_depth(shape) if ring is None else ring)
    order = [i for queue in queues for i in queue]
    last = {queue[-1] for queue in queues if queue}  # these release what their SM has stored; all the others only signal
    words = np.zeros((len(order), WORDS), dtype=np.int32)
    for record, i in zip(words, order, strict=True):
        instruction = program[i]
        pages = instruction.page_uses(shape)
        tape = instruction.tape_page(shape) if pages else 0
        record[:] = encode(
            Scheduled(
                instruction,
                plan.first[i],
                pages,
                tape,
                plan.load_waits[i],
                deps.waits[i],
                deps.signals[i],
                release=i in last and bool(deps.signals[i]),
            )
        )
    return Program(
        shape=shape,
        policy=policy,
        ring=plan.ring,
        words=words,
        starts=np.cumsum([0] + [len(queue) for queue in queues], dtype=np.int32),
        targets=np.array([mask.bit_count() for mask in deps.counters], dtype=np.int32),
        uses=np.array(plan.uses, dtype=np.int32),
    )


def load_program(path: Path) -> Program:
    """Read a saved program and prove it again; raises ScheduleError where that fails, else as `read_program`."""
    program = read_program(path)
    require_valid(program)
    return program
