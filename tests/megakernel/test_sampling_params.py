"""What `SamplingParams` refuses, and what it lets pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megakernel.request import LEAST_TEMPERATURE, SamplingParams
from models.errors import UserError

REFUSED: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": LEAST_TEMPERATURE / 2},
    {"temperature": 5e-324},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_p": math.nan},
    {"seed": -1},
    {"seed": 2**63},
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(values))} "):
        SamplingParams(**values)


def test_ends_of_the_ranges_pass() -> None:
    SamplingParams(LEAST_TEMPERATURE, 0, math.nextafter(0.0, 1.0), 0)
    SamplingParams(0.0, 1 << 40, 1.0, 2**63 - 1)


def test_the_least_temperature_keeps_large_logits_in_fp32() -> None:
    inverse = np.float32(1.0) / np.float32(LEAST_TEMPERATURE)
    assert np.isfinite(np.float32(1e30) * inverse)
