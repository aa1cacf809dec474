"""The measurements of `bench.drafts`: one prompt after the other on two engines that differ in drafts alone.

It knows neither command lines nor records; every function takes loaded engines and returns figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, pstdev
from typing import Any

from bench.draft_tasks import Task
from bench.record import Spread
from megakernel.engine import Engine
from megakernel.request import SamplingParams

LEAST_TOKENS = 8  # of an answer: a shorter one's time says little


@dataclass(frozen=True)
class Answer:
    """A text, the steps in which its tokens were chosen, and the seconds from the request to its last token on the host."""

    tokens: list[int]
    finish: str | None
    steps: int
    seconds: float


@dataclass(frozen=True)
class TaskRecord:
    """One prompt.  `plain` and `drafted` are tokens a second after the first token, without drafts and with them: those of the
    answer but the first, over its time less that of the first token alone; None where it has fewer than LEAST_TOKENS.
    `times_plain` is `drafted` over `plain`, `tokens_per_step` with drafts."""

    name: str
    kind: str
    prompt: int
    tokens: int
    finish: str | None
    tokens_per_step: float
    plain: Spread | None
    drafted: Spread | None
    times_plain: float | None


@dataclass(frozen=True)
class KindRecord:
    """All prompts of a kind.  Means over its `timed` prompts; `deviation` is the standard deviation of `times_plain` from
    prompt to prompt."""

    kind: str
    prompts: int
    timed: int
    tokens: int
    tokens_per_step: float
    plain: float | None = None
    drafted: float | None = None
    times_plain: float | None = None
    deviation: float | None = None
    least: float | None = None
    most: float | None = None


class DraftBench:
    """Two engines on one model: one without drafts, one with them."""

    def __init__(self, plain: Engine, drafting: Engine, limit: int, runs: int, sampling: SamplingParams) -> None:
        self.engines = plain, drafting
        self.limit, self.runs, self.sampling = limit, runs, sampling

    def answer(self, engine: Engine, prompt: Sequence[int], limit: int) -> Answer:
        """One request, nothing of an earlier one reused."""
        begun = time.perf_counter()
        generation = engine.generate(prompt, limit, self.sampling, reuse=False)
        tokens = list(generation)
        return Answer(tokens, generation.finish_reason, generation.steps_made, time.perf_counter() - begun)

    def measure(self, task: Task, prompt: Sequence[int]) -> TaskRecord:
        """One prompt, each engine so often, in turns.  Raises RuntimeError where a text with drafts is another one."""
        plain, drafted = (self.answer(engine, prompt, self.limit) for engine in self.engines)  # makes what is made once
        check(task, plain, drafted)
        count = len(drafted.tokens)
        rates: list[list[float]] = [[], []]
        if count >= LEAST_TOKENS:
            firsts = [median(self.answer(engine, prompt, 1).seconds for _ in range(self.runs)) for engine in self.engines]
            for run in range(self.runs):
                for place in (0, 1) if run % 2 == 0 else (1, 0):
                    found = self.answer(self.engines[place], prompt, self.limit)
                    check(task, plain, found)
                    rates[place].append((count - 1) / max(found.seconds - firsts[place], 1e-9))
        spreads = [Spread.of(runs) if runs else None for runs in rates]
        return TaskRecord(
            name=task.name,
            kind=task.kind,
            prompt=len(prompt),
            tokens=count,
            finish=drafted.finish,
            tokens_per_step=count / max(drafted.steps, 1),
            plain=spreads[0],
            drafted=spreads[1],
            times_plain=spreads[1].median / spreads[0].median if spreads[0] and spreads[1] else None,
        )


def check(task: Task, plain: Answer, found: Answer) -> None:
    """That the text and its end are those without drafts."""
    if (found.tokens, found.finish) != (plain.tokens, plain.finish):
        place = next((i for i, (a, b) in enumerate(zip(found.tokens, plain.tokens, strict=False)) if a != b), "the end")
        raise RuntimeError(f"{task.name}: with drafts the text is another one, from token {place} on")


def summary(records: Sequence[TaskRecord], kind: str) -> KindRecord | None:
    """The records of a kind in one; None where there are none."""
    found = [record for record in records if record.kind == kind]
    if not found:
        return None
    timed = [record for record in found if record.times_plain is not None]
    whole = KindRecord(
        kind=kind,
        prompts=len(found),
        timed=len(timed),
        tokens=sum(record.tokens for record in found),
        tokens_per_step=fmean(record.tokens_per_step for record in timed or found),
    )
    if not timed:
        return whole
    ratios = [record.times_plain for record in timed if record.times_plain is not None]
    figures: dict[str, Any] = {
        "plain": fmean(record.plain.median for record in timed if record.plain),
        "drafted": fmean(record.drafted.median for record in timed if record.drafted),
        "times_plain": fmean(ratios),
        "deviation": pstdev(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }
    return KindRecord(**{**asdict(whole), **figures})
