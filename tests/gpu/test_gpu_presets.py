"""True shapes of every family, cut to two layers: nearer to the plain model in fp32 than that in bf16 is."""

from __future__ import annotations

import pytest
import torch

from bench.rig import Rig, device_sms
from models.packed import pack
from models.reference import Reference
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import PRESET_CASES, programs_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", PRESET_CASES)
def test_error_is_below_that_of_bf16(name: str) -> None:
    case, config, weights = PRESET_CASES[name], config_of(name), weights_of(name)
    tokens = random_tokens(name, case.positions)
    rig = Rig(pack(weights, config, torch.bfloat16, case.capacity), programs_of(case, device_sms()))
    assert rig.page_positions + 1 < case.positions, "both context buckets are used"
    ours = rig.logits_of(tokens)
    with torch.device("cuda"):
        tensors = {name: tensor.cuda() for name, tensor in weights.tensors()}
        true = Reference(config, tensors, torch.float32).logits(tokens).cpu()
        plain = Reference(config, tensors, torch.bfloat16).logits(tokens).cpu()
    error, bound = (ours - true).abs(), (plain - true).abs()
    print(f"rms {error.square().mean().sqrt():.2e} of {bound.square().mean().sqrt():.2e}, spread {true.std():.2f}")
    assert error.square().mean() <= bound.square().mean()
    assert error.max() <= bound.max()
