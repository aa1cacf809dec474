"""A prediction beside a measurement of the same program: how far off is the simulator, and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from scheduler.timeline.account import DRAWERS, account
from scheduler.timeline.anatomy import kind_times
from scheduler.timeline.trace import Trace, TraceError


def comparison(predicted: Trace, measured: Trace) -> dict[str, Any]:
    """Step, drawers and mean time of each kind of instruction, microseconds: [predicted, measured]; error of the step.

    Raises TraceError where the two are not of one program.
    """
    if not np.array_equal(predicted.program.words, measured.program.words):
        raise TraceError("the two traces are of different programs")
    one, two = account(predicted), account(measured)
    kinds = [kind_times(trace, whole.tokens) for trace, whole in ((predicted, one), (measured, two))]
    return {
        "step_us": [one.step / 1e3, two.step / 1e3],
        "error": one.step / two.step - 1.0,
        "drawers_us": {name: [one.mean(name) / 1e3, two.mean(name) / 1e3] for name in DRAWERS},
        "instructions_us": {name: [kind[name]["mean_us"] for kind in kinds] for name in kinds[0]},
    }


def comparison_lines(found: dict[str, Any]) -> Iterator[str]:
    """The comparison as a table."""
    yield f"{'microseconds':<44}{'predicted':>10}{'measured':>10}{'difference':>12}"

    def row(name: str, pair: list[float]) -> str:
        return f"{name:<44}{pair[0]:>10.2f}{pair[1]:>10.2f}{pair[0] - pair[1]:>+12.2f}"

    yield row("step", found["step_us"])
    yield from (row(f"  {DRAWERS[name]}", pair) for name, pair in found["drawers_us"].items())
    yield "one instruction, from its waits met to its signal sent"
    yield from (row(f"  {name}", pair) for name, pair in found["instructions_us"].items())
    yield f"the prediction of the step is off by {found['error']:+.1%}"
