"""What the tests of drawings share."""

from __future__ import annotations

import functools

from models.families import PRESETS
from scheduler.build import make_shape, schedule
from scheduler.costs import MachineModel
from scheduler.draw.content import Drawing, make_drawing
from tests.support.timeline_cases import POSITION, small_program


@functools.cache
def small_drawing(name: str = "head64_llama3", sms: int = 6, layer: int | None = None, policy: str = "balanced") -> Drawing:
    """A model of two layers."""
    return make_drawing(f"{name} <& more>", small_program(name, sms, policy), POSITION, MachineModel(), layer)


@functools.cache
def large_drawing() -> Drawing:
    """Llama-3.2-1B on 132 SMs with a long context: more than ten thousand instructions."""
    shape = make_shape(PRESETS["llama-3.2-1b"], sms=132, capacity=4096, bucket=4096, slices=16)
    return make_drawing("llama-3.2-1b", schedule(shape, 132, "balanced", None), 4000, MachineModel())
