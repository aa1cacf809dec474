"""The simulator's prediction as a trace.

What the simulator does not tell apart has no length here: storing is part of signalling, whose fence is the dear part.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from scheduler.costs import MachineModel
from scheduler.errors import ScheduleError
from scheduler.program import Program
from scheduler.simulate.engine import Engine, Sm, run_jobs
from scheduler.simulate.jobs import jobs_of
from scheduler.timeline.trace import Point, Trace, from_stamps

START = 1  # nanoseconds: a stamp of 0 is one not taken


def nanoseconds(seconds: np.ndarray) -> np.ndarray:
    """Times of the simulation as stamps."""
    return np.rint(seconds * 1e9).astype(np.int64) + START


def issue_times(engine: Engine, sm: Sm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When the SM's loader turned to each page use, and when it issued the copy; and how long it waited for a free page.

    The same recurrence as in the engine, which need not remember: a copy is issued when the one before it was, its page
    has been released, the copies in flight allow it, and, at the start of a token or a load wait, when that is met.
    """
    count, ring, copies = sm.total, engine.jobs.ring, engine.model.copies
    released, others = np.zeros(count), np.zeros(count)
    if count > ring:
        released[ring:] = sm.released[: count - ring]
    if count > copies:
        others[copies:] = sm.landed[: count - copies]
    for number in sm.gates:
        others[number] = max(others[number], engine.gate(sm, number) or 0.0)
    issued = np.maximum.accumulate(np.maximum(released, others))
    turned = np.concatenate(([0.0], issued[:-1]))
    return turned, issued, np.maximum(released - turned, 0.0)


def loader_stamps(engine: Engine, stamps: np.ndarray, landings: np.ndarray) -> None:
    """Fill in the loaders' points and the landings."""
    first_use = 0
    for sm, begin in zip(engine.sms, engine.first, strict=False):
        uses = len(sm.filled)
        if not uses:
            continue
        turned, issued, waited = issue_times(engine, sm)
        landed = np.where(np.tile(sm.filled, engine.tokens), np.asarray(sm.landed), np.nan)
        stamp = nanoseconds(np.nan_to_num(landed)) * ~np.isnan(landed)
        landings[:, first_use : first_use + uses] = stamp.reshape(engine.tokens, uses)
        first_use += uses
        edges = list(accumulate([0] + [len(job.pages) for job in sm.queue]))
        for place, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            if start == stop:
                continue
            for token in range(engine.tokens):
                a, b = token * uses + start, token * uses + stop
                record = stamps[token, begin + place]
                record[Point.LOAD_BEGUN], record[Point.LOAD_ENDED] = nanoseconds(np.array([turned[a], issued[b - 1]]))
                record[Point.LOAD_WAITED] = round(waited[a:b].sum() * 1e9)
                record[Point.LANDED] = max(record[Point.STAGED], nanoseconds(np.asarray(sm.landed[a])))


def engine_trace(program: Program, past: int, engine: Engine) -> Trace:
    """The trace of a finished simulation of a program."""
    model, jobs = engine.model, [job for queue in engine.jobs.queues for job in queue]
    before, after = (np.array([getattr(job, name) for job in jobs]) for name in ("before", "after"))
    stamps = np.zeros((engine.tokens, len(jobs), len(Point)), dtype=np.int64)
    stamps[:, :, Point.FETCHED] = nanoseconds(engine.arrived + model.overhead)
    stamps[:, :, Point.READY] = nanoseconds(engine.started)
    stamps[:, :, Point.STAGED] = stamps[:, :, Point.LANDED] = nanoseconds(engine.started + before)
    stamps[:, :, Point.COMPUTED] = stamps[:, :, Point.STORED] = nanoseconds(engine.ended - after)
    stamps[:, :, Point.SIGNALLED] = nanoseconds(engine.ended)
    stamps[:, :, Point.PAGE_WAITED] = np.rint(engine.page_waits * 1e9)
    landings = np.zeros((engine.tokens, sum(len(sm.filled) for sm in engine.sms)), dtype=np.int64)
    loader_stamps(engine, stamps, landings)
    return from_stamps(program, stamps, past=past, advance=0, machine=model.name, source="simulated", landings=landings)


def simulated_trace(program: Program, past: int, model: MachineModel | None = None, tokens: int = 3) -> Trace:
    """Simulate `tokens` tokens, all with `past` positions cached; raises ScheduleError as `simulate` does, but for 1 token:
    that is shown as it is, with the ring filling."""
    if tokens < 1:
        raise ScheduleError(f"{tokens} tokens to simulate; the least is 1")
    model = model or MachineModel()
    return engine_trace(program, past, run_jobs(jobs_of(program, past, model), model, tokens))
