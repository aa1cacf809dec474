"""Every interleaving of a tiny program, explored: the truth that the checker's verdicts are compared with.

An instruction begins (its waits met, then it reads) and ends (its rows stored, its signals given) at two moments; in
between it may read and write at any time.  All orders of those moments that the waits, queues and rings allow are walked
through, for some tokens.  A fault is a read of rows that are not this token's, two accesses of one row at the same time of
which one writes, a cache page loaded before its rows are stored, or a state where nothing can go on.

That an instruction has ended does not mean that others see what it stored: each SM knows, of every other, how many of its
instructions' stores it can see, and only signals that release pass that on.  A fault is, too, a read of rows that do not
announce themselves, or a cache page loaded, before they can be seen, and a token begun without seeing all of the one before.
A token begins by the counter that `Sample` signals.

Everything else a machine does (a loader's copy, the release of a page, a signal, the look at the token's end) only ever
enables others, so it is done as soon as it can be: delaying it reaches no state that is not reached anyway.

Shares no code with the checker, and knows no numbers: rows have versions, not values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from instructions.base import Region
from instructions.codec import Scheduled, decode
from instructions.sample import Sample
from instructions.shape import ANNOUNCED, HELD_PAGES
from scheduler.program import Program

PER_TOKEN = ("token", "kv")  # buffers that keep every token's rows


class TooManyStates(Exception):
    """The program is not tiny."""


Known = tuple[int, ...]  # of every SM, how many instructions' stores can be seen


def joined(*known: Known) -> Known:
    """What any of them can see."""
    return tuple(map(max, zip(*known, strict=True)))


@dataclass(frozen=True)
class Moments:
    """One SM, as far as it has come: instructions begun and ended (over all tokens), pages loaded and released; what could be
    seen when each instruction began, and what its loader can see."""

    begun: int = 0
    ended: int = 0
    loaded: int = 0
    released: int = 0
    history: tuple[Known, ...] = ()
    sees: Known = ()


@dataclass(frozen=True)
class State:
    """All SMs, and what each counter lets those see who wait for it."""

    sms: tuple[Moments, ...]
    told: tuple[Known, ...]

    def __getitem__(self, sm: int) -> Moments:
        return self.sms[sm]

    def at(self, sm: int, moments: Moments) -> State:
        """The same, but for one SM."""
        return State((*self.sms[:sm], moments, *self.sms[sm + 1 :]), self.told)


class Explorer:
    """Walks through all states of a program."""

    def __init__(self, program: Program, tokens: int, most_states: int) -> None:
        self.tokens, self.most_states, self.ring = tokens, most_states, program.ring
        self.shape, self.uses = program.shape, program.uses.tolist()
        self.queues = [[decode(record) for record in program.queue(sm)] for sm in range(program.sms)]
        self.work = [[Access(item, program) for item in queue] for queue in self.queues]
        self.pages = [
            [(item, item.page + j, j) for item in queue for j in range(item.pages)] for queue in self.queues
        ]  # in the loader's order: record, number within the token, number within the record
        self.producers: dict[int, list[tuple[int, int]]] = {}
        for sm, queue in enumerate(self.queues):
            for place, item in enumerate(queue):
                for counter in item.signals:
                    self.producers.setdefault(counter, []).append((sm, place))
        self.counters = program.counters
        [sample] = [item for queue in self.queues for item in queue if type(item.instruction) is Sample]
        self.end = next(iter(sample.signals), -1)  # the counter by which tokens are opened
        self.nothing: Known = (0,) * program.sms

    def times_ended(self, state: State, sm: int, place: int) -> int:
        """How many tokens' worth of an instruction have ended."""
        return max(0, (state[sm].ended - place - 1) // len(self.queues[sm]) + 1)

    def value(self, state: State, counter: int) -> int:
        """A counter's value."""
        return sum(self.times_ended(state, *producer) for producer in self.producers.get(counter, []))

    def may_begin(self, state: State, sm: int) -> bool:
        """Whether the next instruction of an SM can begin: the token is open, the one before has ended, waits are met."""
        now, queue = state[sm], self.queues[sm]
        if now.begun > now.ended or now.begun == len(queue) * self.tokens:
            return False
        token, place = divmod(now.begun, len(queue))
        if self.value(state, self.end) < token:
            return False
        return all(self.value(state, w.counter) >= w.threshold(token) for w in queue[place].waits)

    def may_end(self, state: State, sm: int) -> bool:
        """Whether the instruction that has begun can end: all its pages have passed."""
        now, queue = state[sm], self.queues[sm]
        if now.begun == now.ended:
            return False
        token, place = divmod(now.ended, len(queue))
        return now.released >= token * len(self.pages[sm]) + sum(item.pages for item in queue[: place + 1])

    def settle(self, state: State) -> State:
        """Do all that only enables: loads, releases.  Raises Fault for a load that comes too early."""
        moving = True
        while moving:
            moving = False
            for sm in range(len(self.queues)):
                now = self.loaded_on(state, sm)
                now = self.released_on(now, sm)
                if now != state[sm]:
                    state, moving = state.at(sm, now), True
        return state

    def loaded_on(self, state: State, sm: int) -> Moments:
        """One more page in the ring of an SM, if it may be loaded."""
        now, pages = state[sm], self.pages[sm]
        if not pages or now.loaded == len(pages) * self.tokens:
            return now
        token, place = divmod(now.loaded, len(pages))
        item, number, j = pages[place]
        if token * self.uses[sm] + number != now.loaded:
            raise Fault("a page use is numbered wrongly")
        if token > 0 and (self.value(state, self.end) < token - 1 or now.begun < (token - 1) * len(self.queues[sm])):
            return now
        if now.loaded - self.ring >= now.released:
            return now
        if j == 0 and item.load_wait and self.value(state, item.load_wait.counter) < item.load_wait.threshold(token):
            return now
        sees = now.sees
        if j == 0 and item.load_wait:
            sees = joined(sees, state.told[item.load_wait.counter])
        if now.loaded >= self.ring:
            sees = joined(sees, now.history[self.taker(sm, now.loaded - self.ring)])
        if j == 0 and not self.chosen(state, sees, token, item):
            return now
        for region in item.instruction.loads(self.shape):
            for writer in self.writers_of(region):
                if self.times_ended(state, *writer) < token:
                    raise Fault(f"{region} is loaded before it is stored")
                if token and sees[writer[0]] < (token - 1) * len(self.queues[writer[0]]) + writer[1] + 1:
                    raise Fault(f"{region} is loaded before it can be seen")
        return replace(now, loaded=now.loaded + 1, sees=sees)

    def chosen(self, state: State, sees: Known, token: int, item: Scheduled) -> bool:
        """Whether what a loader selects by is there; raises Fault where it may take an older token's choice for this one's."""
        there = True
        for region in item.instruction.selects(self.shape):
            for writer in self.writers_of(region):
                if self.times_ended(state, *writer) < token:
                    raise Fault(f"{region} is looked at before it is vacant")
                if token and sees[writer[0]] < (token - 1) * len(self.queues[writer[0]]) + writer[1] + 1:
                    raise Fault(f"{region} is looked at before it can be seen to be vacant")
                there = there and self.times_ended(state, *writer) > token
        return there

    def taker(self, sm: int, use: int) -> int:
        """Which instruction of an SM, over all tokens, takes and releases a page use."""
        token, place = divmod(use, len(self.pages[sm]))
        return token * len(self.queues[sm]) + self.queues[sm].index(self.pages[sm][place][0])

    def released_on(self, now: Moments, sm: int) -> Moments:
        """The next pages of an SM's running instruction taken and released, if they have landed."""
        if now.begun == now.ended:
            return now
        queue = self.queues[sm]
        token, place = divmod(now.ended, len(queue))
        stop = token * len(self.pages[sm]) + sum(item.pages for item in queue[: place + 1])
        request = min(stop - now.released, HELD_PAGES)
        if request <= 0 or now.loaded < now.released + request:
            return now
        return replace(now, released=now.released + request)

    def writers_of(self, region: Region) -> Iterator[tuple[int, int]]:
        """Places of the instructions that write rows of a region."""
        for sm, queue in enumerate(self.work):
            for place, access in enumerate(queue):
                if any(overlap(region, other) for other in access.writes):
                    yield sm, place

    def begin(self, state: State, sm: int) -> State:
        """The next instruction of an SM begins; raises Fault where it may not."""
        now, queue = state[sm], self.queues[sm]
        token, place = divmod(now.begun, len(queue))
        waits = [state.told[wait.counter] for wait in queue[place].waits]
        opened = [state.told[self.end]] if place == 0 and token else []
        known = joined(self.nothing, *now.history[-1:], *waits, *opened)
        known = (*known[:sm], now.ended, *known[sm + 1 :])
        for other, seen in enumerate(known):
            if place == 0 and seen < token * len(self.queues[other]):
                raise Fault(f"token {token} begins without sight of the one before")
        self.check_reads(state, sm, known)
        return state.at(sm, replace(now, begun=now.begun + 1, history=(*now.history, known)))

    def finish(self, state: State, sm: int) -> State:
        """The running instruction of an SM ends, and gives its signals."""
        now = state[sm]
        place = now.ended % len(self.queues[sm])
        item, told = self.queues[sm][place], list(state.told)
        if item.release:
            known = now.history[-1]
            known = (*known[:sm], now.ended + 1, *known[sm + 1 :])
            for counter in item.signals:
                told[counter] = joined(told[counter], known)
        return replace(state.at(sm, replace(now, ended=now.ended + 1)), told=tuple(told))

    def check_reads(self, state: State, sm: int, known: Known) -> None:
        """Raises Fault where the instruction that begins reads other rows than this token's, or cannot see them."""
        token, place = divmod(state[sm].begun, len(self.queues[sm]))
        for region in self.work[sm][place].reads:
            writers = list(self.writers_of(region))
            if not writers:
                raise Fault(f"nobody writes {region}")
            for writer in writers:
                written = self.times_ended(state, *writer)
                wanted = token if region.buffer == "token" else token + 1
                if written < wanted or (region.buffer not in PER_TOKEN and written > wanted):
                    raise Fault(f"reads {region} of token {written - 1} in token {token}")
                unseen = known[writer[0]] < token * len(self.queues[writer[0]]) + writer[1] + 1
                if unseen and region.buffer not in (*ANNOUNCED, "token"):
                    raise Fault(f"reads {region} before it can be seen")

    def check_together(self, state: State) -> None:
        """Raises Fault where two running instructions touch the same row and one writes it."""
        running = [
            (self.work[sm][now.ended % len(self.queues[sm])], now.ended // len(self.queues[sm]))
            for sm, now in enumerate(state.sms)
            if now.begun > now.ended
        ]
        for a, token in running:
            for b, other in running:
                if a is not b and any(
                    overlap(x, y) and (x.buffer not in PER_TOKEN or token == other) and x.buffer != "token"
                    for x in a.writes
                    for y in (*b.reads, *b.writes)
                ):
                    raise Fault("two accesses at once")

    def steps(self, state: State) -> Iterator[State]:
        """All states one visible step further."""
        for sm in range(len(self.queues)):
            if self.may_begin(state, sm):
                further = self.begin(state, sm)
            elif self.may_end(state, sm):
                further = self.finish(state, sm)
            else:
                continue
            following = self.settle(further)
            self.check_together(following)
            yield following

    def explore(self) -> str | None:
        """The first fault found, or None; raises TooManyStates."""
        try:
            sms = tuple(Moments(sees=self.nothing) for _ in self.queues)
            first = self.settle(State(sms, (self.nothing,) * self.counters))
            seen, todo = {first}, [first]
            while todo:
                state = todo.pop()
                further = list(self.steps(state))
                if not further and any(now.ended < len(q) * self.tokens for now, q in zip(state.sms, self.queues, strict=True)):
                    return "deadlock"
                for following in further:
                    if following not in seen:
                        seen.add(following)
                        todo.append(following)
                if len(seen) > self.most_states:
                    raise TooManyStates
        except Fault as fault:
            return str(fault)
        return None


class Fault(Exception):
    """What no valid program does."""


class Access:
    """The regions of one record."""

    def __init__(self, item: Scheduled, program: Program) -> None:
        self.reads = item.instruction.reads(program.shape)
        self.writes = item.instruction.writes(program.shape)


def overlap(a: Region, b: Region) -> bool:
    """Whether two regions share a row."""
    return (a.buffer, a.layer) == (b.buffer, b.layer) and a.start < b.stop and b.start < a.stop


def explore(program: Program, tokens: int = 3, most_states: int = 200_000) -> str | None:
    """The first fault under some interleaving of a program's first tokens, or None where there is none at all."""
    return Explorer(program, tokens, most_states).explore()
