"""What `SamplingParams` refuses, and what it lets pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megakernel.request import LEAST_TEMPERATURE, MOST_TEMPERATURE, SamplingParams
from models.errors import UserError

REFUSED: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": LEAST_TEMPERATURE / 2},
    {"temperature": 5e-324},
    {"temperature": 3.5e38},
    {"temperature": 1e38},
    {"temperature": 10**5000},
    {"temperature": True},
    {"temperature": "1"},
    {"temperature": None},
    {"temperature": 1j},
    {"top_k": -1},
    {"top_k": -(10**5000)},
    {"top_k": 1.0},
    {"top_k": True},
    {"top_k": "1"},
    {"top_p": "0.5"},
    {"top_p": True},
    {"top_p": None},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_p": math.nan},
    {"seed": -1},
    {"seed": 2**63},
    {"seed": 10**5000},
    {"seed": 1.5},
    {"seed": np.float64(1)},
    {"seed": False},
    {"seed": np.bool_(True)},
    {"seed": "1"},
    {"seed": None},
    {"stop_token_ids": 2},
    {"stop_token_ids": None},
    {"stop_token_ids": "2"},
    {"stop_token_ids": (1.5,)},
    {"stop_token_ids": (True,)},
    {"stop_token_ids": ((2,),)},
    {"stop_token_ids": (-1,)},
    {"stop_token_ids": (2**31,)},
]


@pytest.mark.parametrize("values", REFUSED, ids=lambda values: str(next(iter(values))))
def test_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(values))} "):
        SamplingParams(**values)


def test_ends_of_the_ranges_pass() -> None:
    SamplingParams(LEAST_TEMPERATURE, 0, math.nextafter(0.0, 1.0), 0)
    SamplingParams(0.0, 1 << 40, 1.0, 2**63 - 1)


def test_numbers_of_numpy_become_pythons_own() -> None:
    params = SamplingParams(np.float32(0.5), np.int64(3), np.float64(0.5), np.uint8(9), [np.int32(2), 7])  # type: ignore[arg-type]
    assert params == SamplingParams(0.5, 3, 0.5, 9, (2, 7))
    assert [type(value) for value in vars(params).values()] == [float, int, float, int, tuple]
    assert [type(token) for token in params.stop_token_ids] == [int, int]


def test_the_inverse_of_every_temperature_is_a_normal_number() -> None:
    """Smaller ones may be taken for 0, which is greedy."""
    for temperature in (LEAST_TEMPERATURE, MOST_TEMPERATURE):
        inverse = np.float32(1.0) / np.float32(SamplingParams(temperature).temperature)
        assert np.finfo(np.float32).tiny <= inverse < np.inf


def test_the_least_temperature_keeps_large_logits_in_fp32() -> None:
    inverse = np.float32(1.0) / np.float32(LEAST_TEMPERATURE)
    assert np.isfinite(np.float32(1e30) * inverse)
