"""The thread that owns the engine: order, bounds, cancelling, faults, an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from megakernel.request import SamplingParams
from models.errors import MachineError
from serving.decoder import Decoder, EngineDecoder, Progress
from serving.errors import ApiError
from serving.job import Burst, Event, Failure, Job
from serving.queue import FairQueue
from serving.scheduler import Scheduler
from tests.support.cli_fakes import ids_of
from tests.support.scripted import CHUNK, NUMBERLESS, ScriptedBackend, scripted_answer, scripted_engine

SECONDS = 20


class Columns:
    """A decoder that gives each sequence one more of the numbers 1, 2, ... with every step; `gate` lets steps pass."""

    def __init__(self, columns: int = 1) -> None:
        self.columns, self.capacity = columns, 100
        self.places: dict[Job, int] = {}
        self.most = self.steps = self.failures = 0
        self.order: list[Job] = []
        self.gate = threading.Semaphore(0)
        self.free = False

    def start(self, job: Job) -> None:
        assert job not in self.places and len(self.places) < self.columns
        self.places[job] = 0
        self.order.append(job)

    def waits(self, job: Job) -> bool:
        return False

    def step(self) -> dict[Job, Progress]:
        if not self.free:
            self.gate.acquire()
        self.steps += 1
        self.most = max(self.most, len(self.places))
        if self.failures:
            self.failures -= 1
            lost = list(self.places)
            self.places.clear()
            return {job: Progress([], error=MachineError("planted")) for job in lost}
        progress = {}
        for job, count in list(self.places.items()):
            done = count + 1 == job.max_tokens
            progress[job] = Progress([count + 1], "length" if done else None)
            self.places[job] = count + 1
            if done:
                del self.places[job]
        return progress

    def stop(self, job: Job) -> None:
        self.places.pop(job, None)

    def used(self) -> int:
        return sum(self.places.values())

    def reserved(self) -> int:
        return sum(job.max_tokens for job in self.places)

    def probe(self) -> None:
        if self.failures:
            self.failures -= 1
            raise MachineError("planted probe")


class Asker:
    """Makes jobs and keeps what comes of them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.changed = threading.Condition()

    def take(self, event: Event) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def job(self, client: str = "a", tokens: int = 3, prompt: list[int] | None = None) -> Job:
        return Job(prompt or [1, 2, 3], tokens, SamplingParams(), client, self.take)

    def of(self, job: Job) -> list[Event]:
        with self.changed:
            return [event for event in self.events if event.job is job]

    def ended(self, job: Job) -> bool:
        return any(isinstance(event, Failure) or event.finish for event in self.of(job))

    def wait(self, *jobs: Job) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: all(self._ended(job) for job in jobs), SECONDS)

    def _ended(self, job: Job) -> bool:
        return any(isinstance(event, Failure) or event.finish for event in self.events if event.job is job)

    def tokens(self, job: Job) -> list[int]:
        return [token for event in self.of(job) if isinstance(event, Burst) for token in event.tokens]


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def scheduling(decoder: Decoder, limit: int = 8) -> Iterator[Scheduler]:
    scheduler = Scheduler(decoder, limit)
    try:
        yield scheduler
    finally:
        if isinstance(decoder, Columns):
            decoder.free = True
            decoder.gate.release(1000)
        scheduler.close()


def test_clients_take_turns() -> None:
    ask, queue = Asker(), FairQueue(9)
    jobs = {name: ask.job(name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    assert queue.push(list(jobs.values()))
    assert queue.remove(jobs["a2"]) and not queue.remove(jobs["a2"])
    order = [queue.pop() for _ in range(len(queue))]
    assert order == [jobs[name] for name in ("a1", "b1", "c1", "a3", "b2")]
    assert queue.pop() is None and len(queue) == 0


def test_all_jobs_of_a_request_find_room_or_none() -> None:
    ask, queue = Asker(), FairQueue(3)
    assert queue.push([ask.job(), ask.job()])
    assert not queue.push([ask.job("b"), ask.job("b")])
    assert len(queue) == 2 and queue.push([ask.job("b")])


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_columns_are_filled_and_no_more(columns: int) -> None:
    decoder, ask = Columns(columns), Asker()
    decoder.free = True
    with scheduling(decoder, 20) as scheduler:
        jobs = [ask.job(f"client {number}", tokens=3 + number) for number in range(10)]
        scheduler.submit(jobs)
        ask.wait(*jobs)
        for number, job in enumerate(jobs):
            assert ask.tokens(job) == list(range(1, 4 + number))
        assert decoder.most == columns
        eventually(lambda: scheduler.health().running == 0)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    full = "2 requests are waiting, and no more than 2 may; 1 of 1 sequences are being decoded, for which 3 of 100 tokens of"
    decoder, ask = Columns(), Asker()
    with scheduling(decoder, limit=2) as scheduler:
        scheduler.submit([ask.job()])
        eventually(lambda: scheduler.health().running == 1)
        scheduler.submit([ask.job(), ask.job()])
        with pytest.raises(
            ApiError,
            match=full,
        ) as caught:
            scheduler.submit([ask.job()])
        assert caught.value.status == 503 and 1 <= (caught.value.retry_after or 0) <= 60


def test_a_cancelled_job_ends_within_two_launches() -> None:
    engine, ask = scripted_engine(pause=0.01), Asker()
    backend = engine._backend
    assert isinstance(backend, ScriptedBackend)
    with scheduling(EngineDecoder(engine)) as scheduler:
        job = ask.job(tokens=400)
        scheduler.submit([job])
        eventually(lambda: len(ask.of(job)) >= 3)
        launches = backend.launches
        scheduler.cancel(job)
        eventually(lambda: scheduler.health().running == 0)
        assert backend.launches - launches <= 2
        seen = len(ask.of(job))
        following = ask.job(tokens=5)
        scheduler.submit([following])
        ask.wait(following)
        assert ask.tokens(following) == scripted_answer([1, 2, 3], 2048, 5)
        assert len(ask.of(job)) == seen, "it hears nothing more"


def test_a_waiting_job_that_is_cancelled_never_starts() -> None:
    decoder, ask = Columns(), Asker()
    with scheduling(decoder) as scheduler:
        first, second, third = ask.job(tokens=1), ask.job(), ask.job(tokens=1)
        scheduler.submit([first])
        eventually(lambda: decoder.order == [first])
        scheduler.submit([second, third])
        scheduler.cancel(second)
        assert scheduler.health().waiting == 1
        decoder.free = True
        decoder.gate.release()
        ask.wait(first, third)
        assert decoder.order == [first, third] and ask.of(second) == []


def test_a_prompt_that_is_being_read_is_given_up() -> None:
    class Reading(Columns):
        def step(self) -> dict[Job, Progress]:
            time.sleep(0.001)
            return {}

    decoder, ask = Reading(), Asker()
    with scheduling(decoder) as scheduler:
        job = ask.job()
        scheduler.submit([job])
        eventually(lambda: scheduler.health().running == 1)
        scheduler.cancel(job)
        eventually(lambda: scheduler.health().running == 0)
        assert scheduler.health().faults == 0 and decoder.places == {} and ask.of(job) == []


def test_a_fault_is_told_to_those_whom_it_befell_and_to_nobody_else() -> None:
    decoder, ask = Columns(2), Asker()
    with scheduling(decoder) as scheduler:
        jobs = [ask.job(str(number), tokens=2) for number in range(4)]
        scheduler.submit(jobs)
        eventually(lambda: len(decoder.order) == 2)
        decoder.failures = 1
        decoder.free = True
        decoder.gate.release()
        ask.wait(*jobs)
        [failure], [other] = ask.of(jobs[0]), ask.of(jobs[1])
        for event in (failure, other):
            assert isinstance(event, Failure) and isinstance(event.error, ApiError) and event.error.status == 500
        assert [ask.tokens(job) for job in jobs[2:]] == [[1, 2], [1, 2]]
        health = scheduler.health()
        assert (health.state, health.faults, health.last_fault) == ("ok", 1, "MachineError: planted")


def test_an_engine_that_stays_broken_takes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.scheduler.RETRY_SECONDS", (0.2,))
    decoder, ask = Columns(), Asker()
    with scheduling(decoder) as scheduler:
        first, waiting = ask.job("a"), ask.job("b")
        scheduler.submit([first])
        eventually(lambda: len(decoder.order) == 1)
        scheduler.submit([waiting])
        decoder.failures = 3  # of the step, and of two probes
        decoder.free = True
        decoder.gate.release()
        ask.wait(first, waiting)
        [event] = ask.of(waiting)
        assert isinstance(event, Failure) and isinstance(event.error, ApiError) and event.error.status == 503
        assert scheduler.health().state == "failed"
        with pytest.raises(ApiError, match="has failed"):
            scheduler.submit([ask.job()])
        eventually(lambda: scheduler.health().state == "ok")
        again = ask.job(tokens=2)
        scheduler.submit([again])
        ask.wait(again)
        assert ask.tokens(again) == [1, 2]


def test_what_the_engine_refuses_is_no_fault() -> None:
    ask = Asker()
    with scheduling(EngineDecoder(scripted_engine())) as scheduler:
        wrong, right = ask.job(prompt=[10**6]), ask.job(tokens=CHUNK)
        scheduler.submit([wrong, right])
        ask.wait(wrong, right)
        [event] = ask.of(wrong)
        assert isinstance(event, Failure) and isinstance(event.error, ApiError) and event.error.status == 400
        assert scheduler.health().faults == 0 and len(ask.tokens(right)) == CHUNK


def test_what_the_cache_has_no_room_for_waits_and_is_said_with_the_numbers() -> None:
    ask = Asker()
    with scheduling(EngineDecoder(scripted_engine(100, pause=0.01, columns=4)), limit=2) as scheduler:
        first, second, third = (ask.job(name, tokens) for name, tokens in (("a", 60), ("b", 40), ("c", 4)))
        scheduler.submit([first])
        eventually(lambda: scheduler.health().running == 1)
        scheduler.submit([second, third])
        eventually(lambda: second.began == 0 and scheduler.health().waiting == 2)
        with pytest.raises(ApiError, match="1 of 4 sequences are being decoded, for which 62 of 100 tokens of the cache"):
            scheduler.submit([ask.job("d")])
        ask.wait(first, second, third)
        assert first.began < second.began < third.began, "in their order, though the third would have had room"
        for job, tokens in ((first, 60), (second, 40), (third, 4)):
            assert ask.tokens(job) == scripted_answer([1, 2, 3], 2048, tokens)


def test_many_together_of_whom_one_leaves_and_one_has_no_numbers() -> None:
    """The others get their answers, and the engine has not failed."""
    ask, prompt = Asker(), ids_of(NUMBERLESS)
    with scheduling(EngineDecoder(scripted_engine(pause=0.005, columns=8))) as scheduler:
        good = [ask.job(str(number), tokens=30 + number, prompt=[number + 9]) for number in range(6)]
        leaving, numberless = ask.job("g", tokens=100), ask.job("h", prompt=prompt, tokens=40)
        scheduler.submit([*good, leaving, numberless])
        eventually(lambda: bool(ask.of(leaving)))
        assert scheduler.health().running == 8
        scheduler.cancel(leaving)
        ask.wait(*good, numberless)
        for number, job in enumerate(good):
            assert ask.tokens(job) == scripted_answer([number + 9], 2048, 30 + number)
        *taken, failure = ask.of(numberless)
        assert taken and isinstance(failure, Failure) and "no finite numbers" in str(failure.error)
        assert not ask.ended(leaving) and (scheduler.health().state, scheduler.health().faults) == ("ok", 0)


def test_a_step_that_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.scheduler.STALL_SECONDS", 0.05)
    decoder, ask = Columns(), Asker()
    with scheduling(decoder) as scheduler:
        assert scheduler.health().state == "ok"
        scheduler.submit([ask.job()])
        eventually(lambda: scheduler.health().state == "stalled")


def test_draining_lets_run_what_is_there_and_takes_nothing() -> None:
    decoder, ask = Columns(), Asker()
    with scheduling(decoder) as scheduler:
        jobs = [ask.job(), ask.job()]
        scheduler.submit(jobs)
        scheduler.drain()
        with pytest.raises(ApiError, match="stopping"):
            scheduler.submit([ask.job()])
        assert scheduler.health().state == "stopping"
        decoder.free = True
        decoder.gate.release()
        ask.wait(*jobs)
        assert [ask.tokens(job) for job in jobs] == [[1, 2, 3]] * 2


def test_an_abort_tells_everybody() -> None:
    decoder, ask = Columns(), Asker()
    with scheduling(decoder) as scheduler:
        jobs = [ask.job(), ask.job()]
        scheduler.submit(jobs)
        eventually(lambda: scheduler.health().running == 1)
        scheduler.abort("enough")
        ask.wait(*jobs)
        assert all(isinstance(event, Failure) for event in ask.events) and len(ask.events) == 2
    assert scheduler.health().state == "stopped"
