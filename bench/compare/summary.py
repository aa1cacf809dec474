"""From raw records to figures: pure arithmetic, the same for every engine, with no engine's name in it but the baseline's.

A record holds one or more runs (`--merge` puts several together); every engine is compared with the read floor and the
baseline of its own run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from bench.compare.engines import BASELINE
from bench.compare.fidelity import surely_worse
from bench.record import Spread

Record = dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """One engine at one context.  Times in milliseconds.

    batch: prompts decoded together.  whole: tokens a second of all of them, over the whole generation, prefill included.
    tokens_per_second: of all of them, by `step`.
    step: by the difference of a long and a short generation, over the tokens between; prefill and start-up cancel.
    streamed: by the time stamps of a streamed generation, from its first piece to its last; None: the engine does not
    stream.  longest_gap: the longest wait between two pieces, the median of its repeats.  floor_share: the read floor's time
    over `step`'s median.
    """

    context: int
    batch: int
    step: Spread
    whole: Spread
    first_token: Spread
    tokens_per_second: float
    streamed: Spread | None
    longest_gap: float | None
    floor: float | None
    floor_share: float | None


@dataclass(frozen=True)
class Fidelity:
    """Means over the scored positions, in nats; `less_faithful`: surely worse than the baseline, by KL or NLL (None: there is
    no baseline to compare with)."""

    kl: float
    nll_excess: float
    same_top: float
    positions: int
    scoring: str
    less_faithful: bool | None


@dataclass(frozen=True)
class Row:
    """One measured engine.  `fidelity_problem` says why there is no `fidelity`; greedy maps a context to what
    `fidelity.Parting` says, and whether all rounds gave the same tokens."""

    name: str
    label: str
    run: int
    speeds: tuple[Speed, ...]
    load_seconds: float
    ready_seconds: float
    memory_mib: float | None
    fidelity: Fidelity | None
    fidelity_problem: str
    greedy: dict[int, Record]


@dataclass(frozen=True)
class Absent:
    """An engine without figures, why, and if it is not installed the command that installs it."""

    label: str
    run: int
    reason: str
    install: str


def step_times(repeats: Sequence[Record], tokens: int) -> list[float]:
    """Milliseconds a token of each repeat, by difference."""
    return [1e3 * (repeat["long"] - repeat["short"]) / (tokens - 1) for repeat in repeats]


def streamed_times(repeats: Sequence[Record]) -> list[float]:
    """Milliseconds a token of each repeat that streamed in more than one piece, by time stamps."""
    times = []
    for stamps in (repeat["stamps"] for repeat in repeats if repeat["stamps"]):
        after_first = sum(count for _, count in stamps[1:])
        if after_first:
            times.append(1e3 * (stamps[-1][0] - stamps[0][0]) / after_first)
    return times


def longest_gaps(repeats: Sequence[Record]) -> list[float]:
    """Milliseconds between the two pieces of each streamed repeat that are farthest apart."""
    streams = [[stamp for stamp, _ in repeat["stamps"]] for repeat in repeats if len(repeat["stamps"] or ()) > 1]
    return [1e3 * max(after - before for before, after in zip(s, s[1:], strict=False)) for s in streams]


def bandwidth(run: Record) -> float | None:
    """The fastest read of the run, in bytes a second."""
    rates = [floor["bytes_per_second"] for floor in run["floor"] if floor.get("bytes_per_second")]
    return max(rates) if rates else None


def speed(run: Record, context: int, repeats: Sequence[Record]) -> Speed:
    tokens, batch = run["settings"]["tokens"], run["settings"].get("batch", 1)
    step = Spread.of(step_times(repeats, tokens))
    streamed, gaps, rate = streamed_times(repeats), longest_gaps(repeats), bandwidth(run)
    floor = None if rate is None else 1e3 * run["model"]["step_bytes"][str(context)] / rate
    return Speed(
        context=context,
        batch=batch,
        step=step,
        whole=Spread.of([batch * tokens / repeat["long"] for repeat in repeats]),
        first_token=Spread.of([1e3 * repeat["short"] for repeat in repeats]),
        tokens_per_second=batch * 1e3 / step.median if step.median > 0 else float("nan"),
        streamed=Spread.of(streamed) if streamed else None,
        longest_gap=median(gaps) if gaps else None,
        floor=floor,
        floor_share=None if floor is None or step.median <= 0 else floor / step.median,
    )


def fidelity(engine: Record, baseline: Record | None) -> Fidelity | None:
    found = engine.get("fidelity", {})
    if "kl" not in found:
        return None
    judge = (baseline or {}).get("fidelity", {})
    worse: bool | None = None
    if "kl" in judge:
        worse = surely_worse(found["kl"], judge["kl"]) or surely_worse(found["nll"], judge["nll"])
    return Fidelity(
        kl=fmean(found["kl"]),
        nll_excess=fmean(found["nll"]) - fmean(found["reference_nll"]),
        same_top=fmean(found["same_top"]),
        positions=len(found["kl"]),
        scoring=found["scoring"],
        less_faithful=worse,
    )


def rows(runs: Sequence[Record], baseline: str = BASELINE) -> list[Row]:
    """Every measured engine, each once: of several runs' rows of one engine the first stands."""
    found: dict[str, Row] = {}
    for number, run in enumerate(runs):
        judge = next((engine for engine in run["engines"] if engine["name"] == baseline), None)
        for engine in run["engines"]:
            if engine["status"] == "measured" and engine["name"] not in found:
                found[engine["name"]] = row(run, number, engine, judge)
    return list(found.values())


def row(run: Record, number: int, engine: Record, baseline: Record | None) -> Row:
    speeds = tuple(
        speed(run, context, repeats) for context in run["settings"]["contexts"] if (repeats := engine["timings"][str(context)])
    )
    problem = engine.get("fidelity", {}).get("error", "" if "fidelity" in engine else "not scored")
    return Row(
        name=engine["name"],
        label=engine["label"],
        run=number,
        speeds=speeds,
        load_seconds=engine["load_seconds"],
        ready_seconds=engine["ready_seconds"],
        memory_mib=engine.get("memory_mib"),
        fidelity=fidelity(engine, baseline),
        fidelity_problem=problem,
        greedy={int(context): parted for context, parted in engine["greedy"].items()},
    )


def absent(runs: Sequence[Record]) -> list[Absent]:
    """Engines that no run has measured, with their reasons."""
    measured = {engine["name"] for run in runs for engine in run["engines"] if engine["status"] == "measured"}
    missing = []
    for number, run in enumerate(runs):
        for engine in run["engines"]:
            if engine["name"] not in measured:
                install = engine["install"] if engine["status"] == "missing" else ""
                missing.append(Absent(engine["label"], number, engine.get("error", "did not run"), install))
    return missing


def agreement(runs: Sequence[Record]) -> Iterator[tuple[str, int, int, float]]:
    """(label, context, run, ratio to the first run) of every engine that more than one run has measured: how far figures
    of different runs can be compared."""
    first: dict[tuple[str, int], float] = {}
    for number, run in enumerate(runs):
        for engine in run["engines"]:
            if engine["status"] != "measured":
                continue
            for entry in row(run, number, engine, None).speeds:
                key = (engine["name"], entry.context)
                if key in first:
                    yield engine["label"], entry.context, number, entry.step.median / first[key]
                else:
                    first[key] = entry.step.median
