"""What the tests of drawings share."""

from __future__ import annotations

import functools

from models.config import PRESETS
from models.hf_config import parse_config
from scheduler.build import make_shape, schedule
from scheduler.costs import MachineModel
from scheduler.draw.content import Drawing, make_drawing
from tests.support.configs import SMALL_CONFIGS

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024}
POSITION = 600
MANY_SLICES = 5  # enough for every kind of instruction


@functools.cache
def small_drawing(name: str = "head64_llama3", sms: int = 6, layer: int | None = None, policy: str = "balanced") -> Drawing:
    """A model of two layers."""
    config = parse_config({**LLAMA, **SMALL_CONFIGS[name]})
    shape = make_shape(config, sms=sms, capacity=1024, bucket=640, slices=MANY_SLICES)
    return make_drawing(f"{name} <& more>", schedule(shape, sms, policy, None), POSITION, MachineModel(), layer)


@functools.cache
def large_drawing() -> Drawing:
    """Llama-3.2-1B on 132 SMs with a long context: more than ten thousand instructions."""
    shape = make_shape(PRESETS["llama-3.2-1b"], sms=132, capacity=4096, bucket=4096, slices=16)
    return make_drawing("llama-3.2-1b", schedule(shape, 132, "balanced", None), 4000, MachineModel())
