"""Placement: which SM runs which instruction, and in what order.

Every policy keeps each queue in an order in which no instruction stands before one it depends on, so queues alone can
never deadlock.  A policy is a function of the program and its dependencies; the result is a list of queues.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from instructions.base import Instruction
from instructions.shape import Shape
from scheduler.costs import MachineModel, duration
from scheduler.dependencies import Dependencies, members

Queues = list[list[int]]


def stages(program: Sequence[Instruction]) -> Iterator[list[int]]:
    """Consecutive instructions of one kind and layer: the runs that an operation was split into."""
    for _, run in groupby(range(len(program)), key=lambda i: (program[i].OPCODE, program[i].layer)):
        yield list(run)


def queues_of(sm_of: Sequence[int], sms: int) -> Queues:
    """Queues in program order."""
    queues: Queues = [[] for _ in range(sms)]
    for i, sm in enumerate(sm_of):
        queues[sm].append(i)
    return queues


def round_robin(program: Sequence[Instruction], shape: Shape, deps: Dependencies, sms: int) -> Queues:
    """Deal the instructions out one by one, going on where the last operation ended."""
    return queues_of([i % sms for i in range(len(program))], sms)


def zigzag(program: Sequence[Instruction], shape: Shape, deps: Dependencies, sms: int) -> Queues:
    """Deal each operation from the first SM to the last, the next one back, so that uneven ends even out."""
    sm_of = [0] * len(program)
    for turn, stage in enumerate(stages(program)):
        for place, i in enumerate(stage):
            sm_of[i] = place % sms if turn % 2 == 0 else sms - 1 - place % sms
    return queues_of(sm_of, sms)


def balanced(program: Sequence[Instruction], shape: Shape, deps: Dependencies, sms: int) -> Queues:
    """Within each operation the largest runs go to the SMs with the fewest bytes so far, spread evenly over the SMs.

    An operation of few instructions goes to the SMs that have run its kind before: their instruction caches have its code.
    """
    sm_of = [0] * len(program)
    total = [0] * sms
    ran: dict[int, set[int]] = defaultdict(set)  # by opcode, the SMs
    for stage in stages(program):
        weight = {i: program[i].cost(shape, shape.bucket).bytes for i in stage}
        known = ran[program[stage[0]].OPCODE] if 2 * len(stage) <= sms else set()
        heap = [(0, sm not in known, total[sm], sm) for sm in range(sms)]
        heapq.heapify(heap)
        for i in sorted(stage, key=lambda i: (-weight[i], i)):
            here, new, _, sm = heap[0]
            sm_of[i] = sm
            total[sm] += weight[i]
            known.add(sm)
            heapq.heapreplace(heap, (here + max(weight[i], 1), new, total[sm], sm))
    return queues_of(sm_of, sms)


def critical_path(program: Sequence[Instruction], shape: Shape, deps: Dependencies, sms: int) -> Queues:
    """List scheduling: of the instructions that may start, the one farthest from the end goes to the first idle SM."""
    model = MachineModel()
    times = [duration(instruction, shape, shape.bucket, sms, model) for instruction in program]
    waits_on = [[wait.counter for wait in waits if not wait.lag] for waits in deps.waits]
    readers: list[list[int]] = [[] for _ in deps.counters]
    for i, counters in enumerate(waits_on):
        for counter in counters:
            readers[counter].append(i)
    to_end = [0.0] * len(program)
    after = [0.0] * len(deps.counters)
    for i in reversed(range(len(program))):
        to_end[i] = times[i] + max((after[c] for c in deps.signals[i]), default=0.0)
        for counter in waits_on[i]:
            after[counter] = max(after[counter], to_end[i] + model.hop(deps.counters[counter].bit_count()))
    missing = [len(members(mask)) for mask in deps.counters]
    met_at = [0.0] * len(deps.counters)
    open_waits = [len(counters) for counters in waits_on]
    ready = [(0.0, -to_end[i], i) for i, count in enumerate(open_waits) if not count]
    heapq.heapify(ready)
    idle = [(0.0, sm) for sm in range(sms)]
    queues: Queues = [[] for _ in range(sms)]
    while ready:
        start, _, i = heapq.heappop(ready)
        free, sm = heapq.heappop(idle)
        end = max(start, free) + times[i]
        heapq.heappush(idle, (end, sm))
        queues[sm].append(i)
        for counter in deps.signals[i]:
            missing[counter] -= 1
            met_at[counter] = max(met_at[counter], end + model.hop(deps.counters[counter].bit_count()))
            for j in readers[counter] if missing[counter] == 0 else ():
                open_waits[j] -= 1
                if open_waits[j] == 0:
                    begin = max(met_at[c] for c in waits_on[j])
                    heapq.heappush(ready, (begin, -to_end[j], j))
    return queues


Policy = Callable[[Sequence[Instruction], Shape, Dependencies, int], Queues]
POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "zigzag": zigzag,
    "balanced": balanced,
    "critical_path": critical_path,
}
