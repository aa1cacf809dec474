"""The number of SMs changes nothing but the time: the same bits on 1, 7, 64, all but one, and all of them."""

from __future__ import annotations

import functools
from hashlib import sha256

import pytest
import torch

from bench.rig import Rig, device_sms
from models.packed import PackedModel, pack
from scheduler.buckets import BucketPrograms
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import oversized_programs, sm_count_programs

pytestmark = pytest.mark.gpu
MODEL = "gqa4_llama3_tied"
POSITIONS = 40
COUNTS = ["1", "7", "64", "all but one"]  # the GPU is asked how many it has when the test runs, not when it is collected


@functools.cache
def model() -> PackedModel:
    programs = sm_count_programs(1)[1]
    return pack(weights_of(MODEL), config_of(MODEL), torch.bfloat16, programs.capacity)


def outcome(programs: BucketPrograms) -> tuple[list[int], str]:
    """Tokens of one launch, and the logits of every position of the same sequence, launched one by one."""
    rig = Rig(model(), programs)
    prompt = random_tokens(MODEL, 8)
    rig.start(prompt)
    chosen = rig.decode(0, POSITIONS)[len(prompt) - 1 :]
    logits = rig.logits_of([*prompt, *chosen[:-1]])
    assert torch.isfinite(logits).all()
    return chosen, sha256(logits.numpy().tobytes()).hexdigest()


@functools.cache
def expected() -> tuple[list[int], str]:
    """On all SMs."""
    return outcome(sm_count_programs(device_sms())[device_sms()])


@pytest.mark.parametrize("count", COUNTS)
def test_every_sm_count(count: str) -> None:
    sms = device_sms() - 1 if count == "all but one" else int(count)
    assert outcome(sm_count_programs(device_sms())[sms]) == expected()


def test_more_blocks_than_can_be_resident_are_refused() -> None:
    """The driver refuses the launch, instead of letting blocks wait for others that cannot start; nothing is broken by it."""
    rig = Rig(model(), oversized_programs(device_sms()))
    rig.start(random_tokens(MODEL, 8))
    with pytest.raises(RuntimeError, match="(?i)cooperative"):
        rig.decode(0, 1)
    assert outcome(sm_count_programs(device_sms())[device_sms()]) == expected()
