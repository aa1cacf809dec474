"""Small real programs to plant faults in, of many shapes, with models made up to fit them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from instructions.matvec import DTYPES
from instructions.shape import HELD_PAGES
from models.config import ModelConfig
from models.errors import UserError
from models.families import FAMILIES
from models.packed import PackedModel, pack
from models.random_weights import RandomWeights
from scheduler.build import build_program, make_shape
from scheduler.place import POLICIES
from scheduler.program import Program

SCALE = 8.0  # made-up weights times this: tokens then differ from position to position
CAPACITY = 512
COLUMNS = ((1, 1), (1, 1), (1, 1), (1, 2), (1, 4), (2, 1), (4, 1))  # sequences, and the columns of each


@dataclass(frozen=True, eq=False)
class Base:
    """A valid program and weights for it."""

    program: Program
    model: PackedModel

    def __str__(self) -> str:
        program, config = self.program, self.program.shape.config
        return (
            f"{len(program.words)} instructions on {program.sms} SMs ({program.policy}), {config.num_layers} layers, "
            f"ring {program.ring}, {program.shape.slices} slices{', a tail' * program.shape.tail}, "
            f"{program.shape.sequences} sequences of {program.shape.depth} columns"
        )


def random_config(random: Random) -> ModelConfig:
    """A small network."""
    kv_heads, group = random.choice(((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1)))
    family = random.choice(["llama", "qwen3", "qwen3_moe", "olmoe"])  # qwen3 norms heads, olmoe all of them together
    experts = random.choice((1, 3, 8, 20)) if FAMILIES[family].layer.experts else 0
    return ModelConfig(
        hidden_size=random.choice((16, 24, 48, 64)),
        intermediate_size=random.choice((16, 40, 64, 300)),
        num_layers=random.choice((1, 1, 2, 3)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=random.choice((8, 16, 24, 64)),
        vocab_size=random.choice((20, 33, 100)),
        tied_embeddings=random.random() < 0.5,
        family=family,
        num_experts=experts,
        experts_per_token=min(experts, random.choice((1, 2, 3))),
        renormalised=random.random() < 0.5,
        qkv_bias=random.random() < 0.3,
        o_bias=random.random() < 0.3,
        max_position=CAPACITY,
    )


def random_base(seed: int, most_instructions: int = 80) -> Base:
    """Draw a configuration, a machine and a policy until one makes a program of moderate size."""
    random = Random(seed)
    while True:
        config, itemsize = random_config(random), random.choice((2, 4))
        sms = random.choice((1, 2, 3, 4, 6, 9, 13, 20))
        slices = random.choice((None, 1, 2, 3))
        ring = random.choice((None, HELD_PAGES, HELD_PAGES + 1, 7, 10))
        bucket, tail = random.choice((60, 200, CAPACITY)), random.random() < 0.3
        sequences, depth = (1, 1) if tail else random.choice(COLUMNS)
        try:
            sizes: dict[str, Any] = {"sms": sms, "capacity": CAPACITY, "bucket": bucket, "itemsize": itemsize}
            shape = make_shape(config, **sizes, slices=slices, tail=tail, sequences=sequences, depth=depth)
            program = build_program(shape, sms, random.choice(list(POLICIES)), ring)
        except UserError:
            continue  # more groups of readers than a record can signal: the scheduler refuses such splits
        if len(program.words) <= most_instructions:
            return with_weights(program, seed)


def with_weights(program: Program, seed: int) -> Base:
    """Make up weights for a program."""
    shape = program.shape
    model = pack(RandomWeights(shape.config, seed), shape.config, DTYPES[shape.itemsize], CAPACITY)
    model.weights.mul_(torch.tensor(SCALE, dtype=model.weights.dtype))
    return Base(program, model)


def wide_base(seed: int) -> Base:
    """Two layers with the heads of Llama-3.2-1B and slim matrices, for 132 SMs."""
    config = ModelConfig(
        hidden_size=256,
        intermediate_size=1056,
        num_layers=2,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=2112,
        tied_embeddings=True,
        max_position=CAPACITY,
    )
    shape = make_shape(config, sms=132, capacity=CAPACITY, bucket=CAPACITY, slices=4)
    return with_weights(build_program(shape, 132), seed)
