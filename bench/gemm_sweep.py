"""Every plan of a product, timed: from this the rule of `megakernel.gemm.plan.choose_plan` is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from bench.gemm_runs import Operands, check, compile_all, microseconds, our_way
from bench.rig import device_sms
from instructions.dimensions import ceil_div
from megakernel.gemm.plan import CONSUMER_ROWS, CONSUMERS, Plan, Problem, make_plan
from models.errors import UserError

BOXES = (1, 2, 4, 8)
LEAST_OCCUPIED = 0.7  # of the multiprocessors, where whole tiles are tried


def plans(problem: Problem, sms: int) -> Iterator[Plan]:
    """Every tile and step that fits, split evenly, and whole tiles where they occupy most multiprocessors; with two residents
    for kernels that begin early."""
    for consumers in CONSUMERS:
        tiles = ceil_div(problem.rows, consumers * CONSUMER_ROWS)
        for boxes in BOXES:
            for blocks, residents in product({sms, tiles if LEAST_OCCUPIED * sms <= tiles <= sms else sms}, (1, 2)):
                try:
                    yield make_plan(problem, consumers, boxes, blocks, residents)
                except UserError:  # less than two slots fit, or not two blocks
                    continue


def sweep(rows: int, columns: int, tokens: Sequence[int], runs: int) -> None:
    """Print the quickest plans of a matrix for each number of tokens."""
    operands = Operands.random(rows, columns)
    problems = [Problem(m, rows, columns, wide) for wide in (False, True) for m in tokens]
    candidates = {problem: list(plans(problem, device_sms())) for problem in problems}
    compile_all(operands, [(plan, plan.cut.residents > 1) for each in candidates.values() for plan in each])
    for problem, each in candidates.items():
        times = {}
        for plan in each:
            check(operands, plan, plan.cut.residents > 1)
            times[plan] = microseconds(our_way(operands, plan, plan.cut.residents > 1), len(operands.w), runs)
        print(f"{rows}x{columns}, {problem.tokens} tokens in {'bf16' if problem.wide else 'fp8'}")
        for plan in sorted(each, key=lambda plan: (plan.cut.residents, times[plan].median)):
            print(f"  {times[plan].median:7.2f} µs ({times[plan].least:.2f} to {times[plan].most:.2f})  {plan.cut}", flush=True)
