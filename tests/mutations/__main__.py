"""The full campaign against the schedule checker: thousands of planted faults, each rejected or shown harmless.

    python -m tests.mutations                      about 11,000 mutants, an hour on 2 CPUs
    python -m tests.mutations --mutants 500 --jobs 1 --seed 7

Every kind of fault is planted at random places in random small programs, and in one for 132 SMs.  A mutant that the
checker accepts goes on trial: it must give the same bits as the true program on the virtual machine, under the named
adversaries, with SMs starved, and in random orders, where consumers wait for hints and where they pass them as the kernel's
do.  Of the rejected ones some are put on trial as well, to show that the checker does not reject what is sound: most
misbehave within a few runs.  Exit 1 if an accepted one misbehaves.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from bench.pool import worker_pool
from models.command import Parser, command, note, start, whole
from tests.mutations.campaign import Tally, Task, run_task
from tests.mutations.kinds import KINDS

ROUNDS = 2  # mutants of each kind from one program


def tasks_for(options: argparse.Namespace) -> list[Task]:
    """As many programs as the mutants take, the first of them wide."""
    count = -(-options.mutants // (ROUNDS * len(KINDS)))
    first = options.seed * 100_000
    return [Task(first + number, number < options.wide, ROUNDS, options.runs, options.probe) for number in range(count)]


def run_all(tasks: list[Task], jobs: int) -> Iterator[tuple[dict[str, Tally], list[str]]]:
    """The outcome of every task, as they come, from some processes."""
    with worker_pool(jobs) as pool:
        yield from pool.imap_unordered(run_task, tasks)


def print_table(tallies: dict[str, Tally]) -> Tally:
    """One line a kind, then their sum, which is returned."""
    total = Tally()
    print(f"\n{'kind':<28} {'made':>6} {'rejected':>8} {'harmless':>8} {'WRONG':>5}  {'on trial: faults':>16}  found as")
    for kind, tally in tallies.items():
        total.add(tally)
        print(line(kind, tally))
    print(line("all", total))
    return total


def line(name: str, tally: Tally) -> str:
    """One line of the table."""
    often = sorted(tally.findings.items(), key=lambda item: -item[1])
    found = ", ".join(f"{kind} {count}" for kind, count in often)
    trials = f"{tally.probed_faults} of {tally.probed}"
    return f"{name:<28} {tally.made:>6} {tally.rejected:>8} {tally.harmless:>8} {tally.misbehaved:>5}  {trials:>16}  {found}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m tests.mutations", description="Plant faults for the schedule checker.")
    parser.add_argument("--mutants", type=whole(1, 10**8), default=11_000, help="about how many to make (default %(default)s)")
    parser.add_argument(
        "--runs", type=whole(0, 10**6), default=8, help="interleavings an accepted mutant is run under (default %(default)s)"
    )
    parser.add_argument(
        "--probe", type=whole(0, 10**8), default=20, help="try every n-th rejected mutant too; 0: none (default %(default)s)"
    )
    parser.add_argument("--wide", type=whole(0, 10**8), default=1, help="programs for 132 SMs among them (default %(default)s)")
    parser.add_argument("--jobs", type=whole(1, 1024), default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--seed", type=whole(0, 10**9), default=0, help="default %(default)s")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign."""
    options = parse(arguments)
    tallies, complaints = {kind: Tally() for kind in KINDS}, []
    tasks, started = tasks_for(options), time.perf_counter()
    for done, (found, wrong) in enumerate(run_all(tasks, options.jobs), 1):
        for kind, tally in found.items():
            tallies[kind].add(tally)
        complaints += wrong
        made = sum(tally.made for tally in tallies.values())
        note(f"{done} of {len(tasks)} programs, {made} mutants, {len(complaints)} wrong")
    total = print_table(tallies)
    print("\n".join(["", *complaints]))
    result = {"benchmark": "mutations", "seed": options.seed, "runs": options.runs, "programs": len(tasks)}
    kinds = {kind: asdict(tally) for kind, tally in tallies.items()}
    print(json.dumps({**result, **asdict(total), "seconds": round(time.perf_counter() - started), "kinds": kinds}))
    return 1 if complaints else 0


if __name__ == "__main__":
    start(main)
