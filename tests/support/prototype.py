"""The prototype whose measurements the cost model rests on, as jobs: a test's own input, independent of the scheduler.

It streams the projections of one Llama-3.2-1B step and does nothing else: per operation, rows are dealt out in blocks of 16,
going on where the last operation ended; every SM waits until all SMs have finished the operation before.
"""

from __future__ import annotations

from scheduler.costs import MachineModel
from scheduler.simulate import Job, Jobs

ROWS_AND_COLUMNS = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)] * 16 + [(128256, 2048)]
PAGE_VALUES = {2: 8192, 1: 16384}  # weights in a page of 16 KiB, by bytes a weight


def prototype_jobs(model: MachineModel, *, itemsize: int = 2, sms: int = 132, dependencies: bool = True) -> Jobs:
    """65 operations on `sms` SMs, every second page use filled where weights have one byte."""
    queues: list[list[Job]] = [[] for _ in range(sms)]
    first_sm = 0
    for number, (rows, columns) in enumerate(ROWS_AND_COLUMNS):
        blocks, pages = rows // 16, 16 * columns // PAGE_VALUES[itemsize]
        for sm in range(sms):
            count = len(range((sm - first_sm) % sms, blocks, sms))
            queues[sm].append(
                Job(
                    before=model.activation_latency + 4 * columns / model.activation_bandwidth,
                    after=model.release if dependencies else 0.0,
                    pages=(True,) * (count * pages),
                    waits=((number - 1, 0),) if dependencies and number else (),
                    signals=(number,) if dependencies else (),
                )
            )
        first_sm = (first_sm + blocks) % sms
    targets = (sms,) * len(ROWS_AND_COLUMNS) if dependencies else ()
    return Jobs(tuple(tuple(queue) for queue in queues), targets, ring=13, last=(0, len(ROWS_AND_COLUMNS) - 1))
