"""The discrete-event simulation: loaders and consumers of all SMs, page by page, and one HBM that they share.

HBM is a pipe that serves the copies of all SMs in the order in which they were issued, one page every page/bandwidth
seconds; a copy lands `latency` later, and those of one SM at least page/sm_bandwidth apart.  Because every SM has at most
`copies` copies in flight, a first-come pipe shares the bandwidth fairly: an SM cannot queue more than the others.

Only the issue of a copy depends on what all other SMs do, so only issues go through the event queue, in order of time.
All that follows from one is worked out at once: when it lands, when its consumer releases it, when the instruction ends,
whose waits that meets.  None of it can lie before the issue, so the queue stays in order.

A counter's round of a token is met when its producers have signalled for that token.  That is what the monotonic counters
of the machine come to, because no consumer begins a token before the last instruction of the one before has ended.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from itertools import accumulate

import numpy as np

from models.tape import PAGE_BYTES
from scheduler.costs import MachineModel
from scheduler.errors import ScheduleError
from scheduler.simulate.jobs import Job, Jobs

Round = tuple[int, int]  # counter, token


class Sm:
    """One SM: how far its loader and its consumer have come."""

    def __init__(self, number: int, queue: tuple[Job, ...], tokens: int) -> None:
        self.number = number
        self.queue = queue
        self.filled = [filled for job in queue for filled in job.pages]
        self.load_waits: dict[int, int] = {}  # page use within the token: counter
        self.choices: dict[int, int] = {}  # page use within the token: counter that tells of the choice it belongs to
        for job, first in zip(queue, accumulate([0] + [len(job.pages) for job in queue]), strict=False):
            if job.choice is not None and job.pages:
                self.choices[first] = job.choice
            if job.load_wait is not None and job.pages:
                self.load_waits[first] = job.load_wait
        uses = len(self.filled)
        self.total = uses * tokens
        # page uses, counted from the start, that the loader may not just go on to: see `Engine.gate`
        self.gates = {token * uses + use for token in range(1, tokens) for use in {0, *self.load_waits}}
        self.gates |= {token * uses + use for token in range(tokens) for use in self.choices}
        # loader
        self.issuing = False  # its next copy is in the event queue
        self.issued_at = 0.0
        self.landed: list[float] = []  # per page use since the start
        self.released: list[float] = []
        # consumer
        self.begun: list[float] = []  # per token
        self.token = 0
        self.index = 0
        self.pages_left = -1  # -1: the instruction at `index` has not started
        self.clock = 0.0
        self.page_wait = 0.0


class Engine:
    """Runs `tokens` tokens.  Times in seconds since the start, arrays [tokens, instructions] in the order of the words."""

    def __init__(self, jobs: Jobs, model: MachineModel, tokens: int) -> None:
        self.jobs, self.model, self.tokens = jobs, model, tokens
        self.sms = [Sm(number, queue, tokens) for number, queue in enumerate(jobs.queues)]
        self.first = list(accumulate([0] + [len(queue) for queue in jobs.queues]))
        shape = (tokens, self.first[-1])
        self.arrived, self.started, self.ended, self.page_waits = (np.full(shape, np.nan) for _ in range(4))
        self.hops = [model.hop(target) for target in jobs.targets]
        self.service = PAGE_BYTES / model.bandwidth
        self.spacing = PAGE_BYTES / model.sm_bandwidth
        self.hbm_free = 0.0
        self.events: list[tuple[float, int, int]] = []  # time, order of entry (so that ties are first come, first served), SM
        self.entered = 0
        self.token_ends: list[float] = []
        self.signalled: dict[Round, int] = defaultdict(int)
        self.signalled_at: dict[Round, float] = defaultdict(float)
        self.blocked: dict[Round, list[Sm]] = defaultdict(list)  # consumers, by what they wait for
        self.blocked_loaders: dict[Round, list[Sm]] = defaultdict(list)
        self.between_tokens: list[Sm] = []
        self.runnable: deque[Sm] = deque()

    def run(self) -> None:
        """Run to the end; raises ScheduleError where the program deadlocks."""
        for sm in self.sms:
            self.schedule_issue(sm)
        self.runnable.extend(self.sms)
        self.settle()
        while self.events:
            time, _, number = heapq.heappop(self.events)
            self.issue(time, self.sms[number])
        stuck = [sm for sm in self.sms if sm.queue and sm.token < self.tokens]
        if stuck:
            sm = stuck[0]
            raise ScheduleError(f"deadlock: sm {sm.number} never gets past instruction {sm.index} of token {sm.token}")

    def settle(self) -> None:
        """Advance every consumer that may go on."""
        while self.runnable:
            self.advance(self.runnable.popleft())

    # -- loader -----------------------------------------------------------------------------------------------------
    def schedule_issue(self, sm: Sm) -> None:
        """Put the SM's next copy into the event queue, if all that it waits for is known."""
        number, ring, copies = len(sm.landed), self.jobs.ring, self.model.copies
        if sm.issuing or number >= sm.total:
            return
        time = sm.issued_at
        if number >= ring:
            if number - ring >= len(sm.released):
                return
            time = max(time, sm.released[number - ring])
        if number >= copies:
            time = max(time, sm.landed[number - copies])
        if number in sm.gates:
            gate = self.gate(sm, number)
            if gate is None:
                return
            time = max(time, gate)
        sm.issuing = True
        self.entered += 1
        heapq.heappush(self.events, (time, self.entered, sm.number))

    def gate(self, sm: Sm, number: int) -> float | None:
        """When the loader may pass the start of a token, a load wait or a choice before page use `number`; None if not
        known."""
        token, use = divmod(number, len(sm.filled))
        time = 0.0
        if use == 0 and token:
            if len(sm.begun) < token:
                return None
            time = sm.begun[token - 1]
        rounds = [(sm.load_waits[use], token - 1)] if use in sm.load_waits and token else []
        rounds += [(sm.choices[use], token)] if use in sm.choices else []
        for round_ in rounds:
            if not self.met(round_):
                self.blocked_loaders[round_].append(sm)
                return None
            time = max(time, self.met_at(round_))
        return time

    def issue(self, time: float, sm: Sm) -> None:
        """Issue the next copy of an SM now, and follow up what its landing sets off."""
        page = len(sm.landed)
        previous = sm.landed[-1] if page else -self.spacing
        filled = sm.filled[page % len(sm.filled)]
        if filled:
            self.hbm_free = max(self.hbm_free, time) + self.service
            landing = max(self.hbm_free + self.model.latency, previous + self.spacing)
        else:
            landing = max(time, previous)
        sm.landed.append(landing)
        sm.issued_at, sm.issuing = time, False
        if sm.pages_left > 0:  # its consumer has drained all earlier pages and waits for this one
            self.drain(sm, landing, filled)
            if sm.pages_left == 0:
                self.runnable.append(sm)
                self.settle()
        self.schedule_issue(sm)

    # -- consumer ---------------------------------------------------------------------------------------------------
    def advance(self, sm: Sm) -> None:
        """Run the consumer until it must wait for something that is not known yet."""
        while sm.queue and sm.token < self.tokens:
            job = sm.queue[sm.index]
            if sm.pages_left < 0 and not self.start(sm, job):
                return
            if not self.consume(sm, job):
                return
            self.finish(sm, job)

    def start(self, sm: Sm, job: Job) -> bool:
        """Pass the waits of the instruction at the head of the queue; False if one is not met yet."""
        if len(sm.begun) <= sm.token:
            if len(self.token_ends) < sm.token:
                self.between_tokens.append(sm)
                return False
            if sm.token:
                sm.clock = max(sm.clock, self.token_ends[sm.token - 1] + self.model.poll)
            sm.begun.append(sm.clock)
            self.schedule_issue(sm)
        rounds = [(counter, sm.token - lag) for counter, lag in job.waits if sm.token >= lag]
        for round_ in rounds:
            if not self.met(round_):
                self.blocked[round_].append(sm)
                return False
        place = sm.token, self.first[sm.number] + sm.index
        start = sm.clock + self.model.overhead
        for round_ in rounds:
            start = max(start, self.met_at(round_))
        self.arrived[place], self.started[place] = sm.clock, start
        sm.clock, sm.pages_left, sm.page_wait = start + job.before, len(job.pages), 0.0
        return True

    def drain(self, sm: Sm, landing: float, filled: bool) -> None:
        """The consumer takes the next page and releases it."""
        if landing > sm.clock:
            sm.page_wait += landing - sm.clock
            sm.clock = landing
        if filled:
            sm.clock += self.model.drain
        sm.released.append(sm.clock)
        sm.pages_left -= 1

    def consume(self, sm: Sm, job: Job) -> bool:
        """Drain the pages that have been issued; False if some are still to come."""
        if sm.pages_left:
            first = len(sm.released)
            use = len(job.pages) - sm.pages_left
            for landing in sm.landed[first : first + sm.pages_left]:
                self.drain(sm, landing, job.pages[use])
                use += 1
            self.schedule_issue(sm)
        return sm.pages_left == 0

    def finish(self, sm: Sm, job: Job) -> None:
        """Signal, and go on to the next instruction."""
        place = sm.token, self.first[sm.number] + sm.index
        sm.clock += job.after
        self.ended[place], self.page_waits[place] = sm.clock, sm.page_wait
        for counter in job.signals:
            self.signal((counter, sm.token), sm.clock)
        if (sm.number, sm.index) == self.jobs.last:
            self.token_ends.append(sm.clock)
            self.runnable.extend(self.between_tokens)
            self.between_tokens.clear()
        sm.pages_left = -1
        sm.index += 1
        if sm.index == len(sm.queue):
            sm.token, sm.index = sm.token + 1, 0

    # -- counters ---------------------------------------------------------------------------------------------------
    def met(self, round_: Round) -> bool:
        """Whether all producers have signalled."""
        return self.signalled[round_] == self.jobs.targets[round_[0]]

    def met_at(self, round_: Round) -> float:
        """When those who wait for it see that it is met."""
        return self.signalled_at[round_] + self.hops[round_[0]]

    def signal(self, round_: Round, time: float) -> None:
        """One producer's signal; wakes who waits for the last of them."""
        self.signalled[round_] += 1
        self.signalled_at[round_] = max(self.signalled_at[round_], time)
        if self.met(round_):
            self.runnable.extend(self.blocked.pop(round_, ()))
            for sm in self.blocked_loaders.pop(round_, ()):
                self.schedule_issue(sm)


def run_jobs(jobs: Jobs, model: MachineModel, tokens: int) -> Engine:
    """Simulate `tokens` tokens of jobs; the engine holds the times."""
    engine = Engine(jobs, model, tokens)
    engine.run()
    return engine
