"""What a simulation says of a program: the step time, and where each SM's time went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.tape import PAGE_BYTES
from scheduler.costs import MachineModel
from scheduler.errors import ScheduleError
from scheduler.program import Program
from scheduler.simulate.engine import run_jobs
from scheduler.simulate.jobs import jobs_of


@dataclass(frozen=True, eq=False)
class Simulation:
    """The last of `tokens` simulated tokens, all at the same position; times in seconds.

    A step runs from one token's end to the next one's.  Within it each SM is busy, or idle for one of three reasons:
    waiting for a counter, waiting for a page, or done with its queue until the token ends.

    arrived, started, ended, page_waits   float64 [instructions], in the order of the program's words: when the consumer
        came to the instruction, when its waits were met, when it had signalled (since the start of the step; the first may
        lie before it), and how long it waited for pages in between
    idle_counter, idle_page, idle_done    float64 [sms], seconds a step
    """

    model: MachineModel
    past: int
    step_times: tuple[float, ...]  # of every token simulated; the first one starts with an empty ring
    bytes: int  # from HBM, a step
    arrived: np.ndarray
    started: np.ndarray
    ended: np.ndarray
    page_waits: np.ndarray
    idle_counter: np.ndarray
    idle_page: np.ndarray
    idle_done: np.ndarray

    @property
    def step_time(self) -> float:
        """Seconds a token in the steady state."""
        return self.step_times[-1]

    @property
    def bandwidth(self) -> float:
        """Bytes a second that HBM delivers."""
        return self.bytes / self.step_time

    @property
    def idle(self) -> np.ndarray:
        """Seconds a step that each SM's consumer waits for anything, float64 [sms]."""
        return self.idle_counter + self.idle_page + self.idle_done


def simulate(program: Program, past: int, model: MachineModel | None = None, tokens: int = 3) -> Simulation:
    """Predict the step time of a program with `past` positions cached.

    Raises ScheduleError for a position it was not made for, fewer than 2 tokens, or a program that deadlocks.
    """
    if tokens < 2:
        raise ScheduleError(f"{tokens} tokens to simulate; the steady state needs at least 2")
    model = model or MachineModel()
    jobs = jobs_of(program, past, model)
    engine = run_jobs(jobs, model, tokens)
    ends = [0.0, *engine.token_ends]
    begin, end = ends[-2:]
    arrived, started, ended, page_waits = (
        times[-1] for times in (engine.arrived, engine.started, engine.ended, engine.page_waits)
    )
    sms = range(program.sms)
    queues = [slice(program.starts[sm], program.starts[sm + 1]) for sm in sms]
    counter_waits = np.maximum(started - arrived - model.overhead, 0.0)
    idle_counter = np.array([counter_waits[queue].sum() for queue in queues])
    idle_page = np.array([page_waits[queue].sum() for queue in queues])
    spans = [ended[queue][-1] - arrived[queue][0] if len(ended[queue]) else 0.0 for queue in queues]
    bytes_ = sum(PAGE_BYTES * sum(job.pages) for queue in jobs.queues for job in queue)
    bytes_ += sum(
        item.instruction.cost(program.shape, past).bytes for queue in program.decoded for item in queue if not item.pages
    )
    return Simulation(
        model=model,
        past=past,
        step_times=tuple(np.diff(ends).tolist()),
        bytes=bytes_,
        arrived=arrived - begin,
        started=started - begin,
        ended=ended - begin,
        page_waits=page_waits,
        idle_counter=idle_counter,
        idle_page=idle_page,
        idle_done=(end - begin) - np.array(spans),
    )
