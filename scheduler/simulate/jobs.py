"""What the simulator needs of a program: per instruction a few times, its page uses, its waits and signals.

Jobs are made from the words of a program, by the same decoder that the machines use.  They know nothing of models or
regions any more, so a test can write them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.choose import Choose
from instructions.codec import Scheduled
from instructions.sample import Sample
from scheduler.costs import MachineModel, preparation
from scheduler.errors import ScheduleError
from scheduler.program import Program


@dataclass(frozen=True)
class Job:
    """One instruction of one token.

    `before` and `after` are the seconds the consumer spends between the end of its waits and its first page, and between
    its last page and its signals.  `pages` says of each page use whether it is copied from HBM or passes through empty.
    A wait is (counter, lag); `load_wait` is the counter of which the loader awaits the previous token's round, or None;
    `choice` that of which it awaits this token's, since it tells of the choice by which the loader finds its pages.
    """

    before: float = 0.0
    after: float = 0.0
    pages: tuple[bool, ...] = ()
    waits: tuple[tuple[int, int], ...] = ()
    load_wait: int | None = None
    signals: tuple[int, ...] = ()
    choice: int | None = None


@dataclass(frozen=True)
class Jobs:
    """Queues of jobs, SM by SM; `targets` are the signals each counter gets in a token; the token ends with job
    `last` = (sm, index), and no consumer begins the next one earlier."""

    queues: tuple[tuple[Job, ...], ...]
    targets: tuple[int, ...]
    ring: int
    last: tuple[int, int]


def choices_of(program: Program) -> dict[int, int]:
    """By layer the counter that tells of its choice of experts."""
    items = (item for queue in program.decoded for item in queue)
    return {item.instruction.layer: item.signals[0] for item in items if isinstance(item.instruction, Choose) and item.signals}


def job_of(item: Scheduled, program: Program, past: int, model: MachineModel, choices: dict[int, int]) -> Job:
    """The job of one decoded record with `past` positions cached."""
    instruction, shape = item.instruction, program.shape
    for wait in (*item.waits, *([item.load_wait] if item.load_wait else [])):
        if not 0 <= wait.counter < program.counters or wait.target != program.targets[wait.counter]:
            raise ScheduleError(f"{instruction} waits for {wait.target} signals of counter {wait.counter}: check the program")
    selects = bool(instruction.selects(shape))
    sources = (instruction.page_source(shape, item.tape, use, past) for use in range(item.pages))
    return Job(
        before=preparation(instruction, shape, model),
        after=model.ending(item.release),
        pages=tuple(source is not None for source in sources),
        waits=tuple((wait.counter, wait.lag) for wait in item.waits),
        load_wait=item.load_wait.counter if item.load_wait else None,
        choice=choices.get(instruction.layer) if selects else None,
        signals=item.signals,
    )


def jobs_of(program: Program, past: int, model: MachineModel) -> Jobs:
    """The jobs of a program; raises ScheduleError for a position it was not made for, or words it cannot follow."""
    if not 0 <= past <= program.shape.bucket:
        raise ScheduleError(f"position {past} in a program made for positions 0 to {program.shape.bucket}")
    last, choices = None, choices_of(program)
    for sm, queue in enumerate(program.decoded):
        for index, item in enumerate(queue):
            last = (sm, index) if isinstance(item.instruction, Sample) else last
    if last is None:
        raise ScheduleError("the program has no sample instruction, so its token never ends")
    return Jobs(
        queues=tuple(tuple(job_of(item, program, past, model, choices) for item in queue) for queue in program.decoded),
        targets=tuple(int(target) for target in program.targets),
        ring=program.ring,
        last=last,
    )
