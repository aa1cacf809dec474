"""Programs that the scheduler's tests share: small models by name, and hypothesis strategies for everything a program is
made for."""

from __future__ import annotations

import functools
from typing import NamedTuple

from hypothesis import strategies as st

from instructions.base import Instruction
from instructions.shape import Shape
from models.config import ModelConfig
from models.families import FAMILIES, PRESETS
from scheduler.build import build_program, make_shape, schedule
from scheduler.dependencies import Dependencies, derive
from scheduler.lower import lower
from scheduler.place import POLICIES
from scheduler.program import Program
from tests.support.configs import small_config


def small_program(name: str, sms: int, policy: str = "zigzag", bucket: int = 128, slices: int | None = None) -> Program:
    """A program for one of the small models, with a cache of 256 positions."""
    shape = make_shape(small_config(name), sms=sms, capacity=256, bucket=bucket, slices=slices)
    return build_program(shape, sms, policy)


@functools.cache
def preset_program(name: str, sms: int = 132, policy: str = "balanced", bucket: int = 256) -> Program:
    """A program for a preset, as an engine would ask for it; not proved, which takes longer than making it."""
    return schedule(make_shape(PRESETS[name], sms=sms, capacity=4096, bucket=bucket), sms, policy, None)


class Lowered(NamedTuple):
    """A model lowered for some SMs, its dependencies derived, nothing placed yet."""

    shape: Shape
    sms: int
    instructions: list[Instruction]
    dependencies: Dependencies


def lowered(shape: Shape, sms: int) -> Lowered:
    """Lower and derive."""
    instructions = lower(shape, sms)
    return Lowered(shape, sms, instructions, derive(instructions, shape))


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Models of at most two layers whose sizes fit no block, page or head size by intent."""
    kv_heads = draw(st.integers(1, 4))
    family = draw(st.sampled_from(["llama", "qwen3", "qwen3_moe", "olmoe"]))  # qwen3 norms heads, olmoe all of them together
    experts = draw(st.integers(1, 9)) if FAMILIES[family].layer.experts else 0
    return ModelConfig(
        hidden_size=draw(st.integers(1, 40)) * 4,
        intermediate_size=draw(st.integers(1, 150)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 40)) * 2,
        vocab_size=draw(st.integers(2, 300)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        family=family,
        num_experts=experts,
        experts_per_token=draw(st.integers(1, min(experts, 3))) if experts else 0,
    )


@st.composite
def shapes(draw: st.DrawFn, sms: int) -> Shape:
    """Everything a program on `sms` SMs may be made for, small."""
    capacity = draw(st.integers(1, 600))
    return make_shape(
        draw(configs()),
        sms=sms,
        capacity=capacity,
        bucket=draw(st.integers(1, capacity)),
        itemsize=draw(st.sampled_from((2, 4))),
        slices=draw(st.none() | st.integers(1, 5)),
        tail=draw(st.booleans()),
    )


@st.composite
def programs(draw: st.DrawFn, most_sms: int = 200) -> Program:
    """Finished programs on 1 to `most_sms` SMs, of every policy, with the deepest or the shallowest ring."""
    sms = draw(st.integers(1, most_sms))
    return build_program(draw(shapes(sms)), sms, draw(st.sampled_from(sorted(POLICIES))), draw(st.sampled_from((None, 4, 5))))
