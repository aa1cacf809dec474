"""The measurements of `bench.decode --columns`: what a step of several columns takes, and what drafts are worth.

Drafts are planted: the bench decodes the true tokens first, then gives those as drafts, a share of them spoilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.column_rig import ColumnRig, column_programs
from bench.record import Spread
from bench.rig import Rig, programs_of
from megakernel.gpu.backend import CHUNK
from megakernel.gpu.columns import spoilt
from megakernel.gpu.machine import GpuState
from models.packed import PackedModel

WRONG = 0.0


@dataclass(frozen=True)
class ColumnRecord:
    """One context length: `ms_per_step` with all columns in use, beside one column alone in the same process; with several
    columns of one sequence also what planted drafts make, of which the share `right` is right."""

    context: int
    sequences: int
    depth: int
    one_column_ms: Spread
    ms_per_step: Spread
    times_one_column: float
    right: float | None
    drafted_ms_per_step: Spread | None
    tokens_per_step: float | None
    tokens_per_second: float


class ColumnBench:
    """One state that one column and several take turns on, so that a large model is in memory once."""

    def __init__(self, model: PackedModel, sequences: int, depth: int) -> None:
        alone, programs = programs_of(model), column_programs(model, sequences, depth)
        pages = programs.shape(programs.capacity).cache_pages
        state = GpuState(model, pages, torch.device("cuda", 0), sequences)
        state.cache.normal_()
        self.one = Rig(model, alone, state=state)
        self.several = ColumnRig(model, programs, alone, state)
        self.vocabulary = model.config.vocab_size

    def prompt(self, context: int) -> list[int]:
        """Random tokens up to and with that position."""
        generator = torch.Generator().manual_seed(context)
        return torch.randint(self.vocabulary, (context + 1,), generator=generator).tolist()

    def continuation(self, context: int, tokens: int) -> list[int]:
        """What follows the prompt of a context."""
        self.one.start(self.prompt(context))
        return self.one.decode(context, tokens)

    def step(self, context: int, steps: int, true: Sequence[int], right: float) -> tuple[float, float]:
        """Milliseconds of a step from a context on, and the tokens that it makes; of the drafts a share is right."""
        rig, depth = self.several, self.several.programs.depth
        end = context + steps * (depth if right else 1)
        for number in range(rig.programs.sequences):
            rig.join(number, self.prompt(context), end, position=context)
        if depth > 1:
            rig.give(context + 1, spoilt(true, right, self.vocabulary))
        rig.run(1)  # the first has no drafts
        milliseconds, tokens, made = 0.0, 0, 0
        while made < steps and rig.positions[0] < end:
            took, count, done = rig.timed(CHUNK, max(1, min(steps - made, end - rig.positions[0]) // CHUNK))
            milliseconds, tokens, made = milliseconds + took * done, tokens + count, made + done
            if not done:
                break
        return milliseconds / made, tokens / made

    def measure(self, context: int, steps: int, runs: int, right: float) -> ColumnRecord:
        """One context length, each kind of run so often."""
        sequences, depth = self.several.programs.sequences, self.several.programs.depth
        true = self.continuation(context, steps * depth)
        for _ in range(2):  # compiles, and brings the clocks up
            self.one.timed(self.one.launches(context, steps, CHUNK))
            self.step(context, steps, true, WRONG)
        one = Spread.of([self.one.timed(self.one.launches(context, steps, CHUNK)) for _ in range(runs)])
        full = Spread.of([self.step(context, steps, true, WRONG)[0] for _ in range(runs)])
        drafted, worth = None, float(sequences)
        if depth > 1:
            found = [self.step(context, steps, true, right) for _ in range(runs)]
            drafted, worth = Spread.of([took for took, _ in found]), sum(made for _, made in found) / runs
        took = (full if drafted is None else drafted).median
        return ColumnRecord(
            context=context,
            sequences=sequences,
            depth=depth,
            one_column_ms=one,
            ms_per_step=full,
            times_one_column=full.median / one.median,
            right=right if depth > 1 else None,
            drafted_ms_per_step=drafted,
            tokens_per_step=worth,
            tokens_per_second=1e3 * worth / took,
        )


def measure_columns(
    model: PackedModel, contexts: Sequence[int], steps: int, runs: int, columns: tuple[int, int], right: float
) -> list[dict[str, Any]]:
    """All contexts, printing a line each."""
    bench = ColumnBench(model, *columns)
    records = []
    for context in contexts:
        record = bench.measure(context, steps, runs, right)
        print(column_line(record), flush=True)
        records.append(asdict(record))
    return records


def column_line(record: ColumnRecord) -> str:
    """One context for people to read."""
    what = f"{record.sequences} sequences" if record.sequences > 1 else f"{record.depth} columns"
    line = f"context {record.context:>6}, {what}: {record.ms_per_step.median:.4f} ms a step, "
    line += f"{record.times_one_column:.3f} times one column ({record.one_column_ms.median:.4f})"
    if record.drafted_ms_per_step is not None:
        line += f"; {record.right:.0%} of the drafts right: {record.tokens_per_step:.2f} tokens a step"
    return f"{line}, {record.tokens_per_second:.0f} tokens/s"
