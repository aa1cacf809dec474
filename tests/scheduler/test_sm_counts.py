"""Any number of SMs from 1 to 200, any preset, and the bundled model: a finished, proven program each time."""

from __future__ import annotations

import pytest

from instructions.shape import ceil_div
from models.config import ModelConfig
from models.families import PRESETS
from models.hf_config import read_config
from models.tape import PAGE_BYTES
from scheduler.build import build_program, make_shape
from scheduler.place import POLICIES
from scheduler.program import Program
from tests.support import BUNDLED
from tests.support.configs import small_config


def program(config: ModelConfig, sms: int, policy: str, bucket: int) -> Program:
    return build_program(make_shape(config, sms=sms, capacity=256, bucket=bucket), sms, policy)


def check(built: Program, sms: int) -> None:
    shape = built.shape
    assert built.sms == sms and len(built.uses) == sms
    assert built.uses.sum() >= shape.tape.streamed_bytes // PAGE_BYTES
    assert (built.targets > 0).all()
    heads = sum(item.instruction.MNEMONIC == "lm_head" for queue in built.decoded for item in queue)
    assert heads == min(sms, ceil_div(shape.config.vocab_size, 16))


@pytest.mark.parametrize("name", ["gqa4_llama3_tied", "head40_llama3_mha"])
def test_every_sm_count(name: str) -> None:
    for sms in range(1, 201):
        policy = sorted(POLICIES)[sms % len(POLICIES)]
        check(program(small_config(name), sms, policy, bucket=256), sms)


@pytest.mark.parametrize("name", ["ragged_sizes", "head24_odd_blocks", "all_biases_linear_head24", "mqa_linear", "gqa8"])
def test_awkward_models_on_awkward_counts(name: str) -> None:
    for number, sms in enumerate((1, 2, 3, 17, 64, 131, 132, 144, 200)):
        check(program(small_config(name), sms, sorted(POLICIES)[number % 4], bucket=256), sms)


@pytest.mark.parametrize("sms", [1, 13, 132, 200])
def test_the_bundled_model(sms: int) -> None:
    check(program(read_config(BUNDLED), sms, "zigzag", bucket=256), sms)


LARGER = ("qwen3-8b", "granite-3.3-8b")
MANY = ("llama-3.2-1b", "smollm2-135m", *LARGER)  # with 199 SMs a preset takes seconds


@pytest.mark.parametrize(
    ("preset", "sms"),
    [
        *((name, 1) for name in sorted(PRESETS)),
        *(pytest.param(name, 199, marks=[pytest.mark.full] if name in LARGER else []) for name in MANY),
    ],
)
def test_presets(preset: str, sms: int) -> None:
    check(program(PRESETS[preset], sms, "balanced", bucket=256), sms)
