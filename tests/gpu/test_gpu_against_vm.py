"""The kernel computes what the CPU machine computes: logits within what rounding allows, greedy tokens the same.

Both round the same values to bf16, and sum in fp32 in another order.  Where that tips a rounding the other way, one result
carries another rounding error than the other, of the same kind and size.  How large those are is measured: the CPU machine
against the plain model in fp32 with the same bf16 weights.  Two results that carry such errors independently differ by at
most twice the largest; and because most roundings do fall the same way, in the mean by less than one of them.
"""

from __future__ import annotations

import pytest
import torch

from bench.rig import Rig, device_sms
from models.packed import pack
from tests.support.gpu_models import config_of, weights_of
from tests.support.preparation import CASES, Expected, Preparation, programs_of

pytestmark = pytest.mark.gpu
CLEAR = 0.2  # at least this part of a random model's positions must have a clear best token, or the test shows little


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def allowed_error(expected: Expected) -> float:
    return 2 * float((expected.logits - expected.reference).abs().max())


def clear_choices(expected: Expected) -> torch.Tensor:
    """Positions whose best token leads by more than any error of the two logits, bool [positions]."""
    best = expected.logits.topk(2).values
    return best[:, 0] - best[:, 1] > 2 * allowed_error(expected)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(name: str, preparation: Preparation) -> None:
    case, expected = CASES[name], preparation.expected[name].result()
    preparation.compiled[name].result()
    rig = Rig(pack(weights_of(name), config_of(name), torch.bfloat16, case.capacity), programs_of(case, device_sms()))
    page = rig.page_positions
    assert {0, 1, page - 1, page, page + 1} < set(range(case.positions)), "both sides of a page's edge are decoded"

    logits = rig.logits_of(expected.tokens[:-1])
    assert torch.isfinite(logits).all()
    error, rounding = logits - expected.logits, expected.logits - expected.reference
    allowed = allowed_error(expected)
    print(f"largest error {error.abs().max():.2e} of {allowed:.2e}, rms {rms(error) / rms(rounding):.2f} of rounding's")
    assert error.abs().max() <= allowed
    assert rms(error) <= rms(rounding)
    clear = clear_choices(expected)
    assert clear.float().mean() > CLEAR
    assert (logits.argmax(1) == expected.logits.argmax(1))[clear].all()

    rig.start(expected.tokens[: case.prompt])
    chosen = rig.decode(0, case.positions)[case.prompt - 1 :]
    wanted = expected.tokens[case.prompt :]
    assert len(chosen) == len(wanted) == case.positions - case.prompt + 1
    ties = torch.nonzero(~clear[case.prompt - 1 :]).flatten().tolist()
    agreed = ties[0] if ties else len(wanted)
    assert chosen[:agreed] == wanted[:agreed]

    own = rig.logits_of([*expected.tokens[: case.prompt], *chosen[:-1]], first=case.prompt - 1)
    assert chosen == own.argmax(1).tolist(), "the tokens chosen are the best of the kernel's own logits"


def test_the_last_position_of_a_capacity_is_decoded() -> None:
    """The cases that end at their capacity end inside a KV page; the token after the last position is chosen as well."""
    full = [case for case in CASES.values() if case.positions == case.capacity]
    assert len(full) > 3
    for case in full:
        assert case.capacity % programs_of(case, device_sms()).shape(case.capacity).page_positions
