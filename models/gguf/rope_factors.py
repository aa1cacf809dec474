"""Llama 3's RoPE scaling, found again in the factors that llama.cpp makes of it.

A file keeps, in place of the scaling's four numbers, what each frequency is divided by: 1 for the high ones, `factor` for the
low ones, and between them an interpolation. Dividing by those would do to compute with, but what reads a configuration wants
the numbers. Two of the interpolated factors determine them; where there are fewer, the usual ones are tried.
"""

from __future__ import annotations

import numpy as np

from models.config import LEAST_FLOAT, MOST_FLOAT, SIZE_LIMIT, RopeScaling

# low_freq_factor, high_freq_factor and original positions: those of Llama 3.1, 3.2 and 3.3 first
USUAL = ((1.0, 4.0, 8192), *((1.0, 4.0, 2**power) for power in range(1, 24)))
TOLERANCE = 1e-5  # relative: factors are kept in fp32, and made in it of frequencies in fp32


def scaling_of(factors: np.ndarray, theta: float, head_dim: int) -> RopeScaling | None:
    """The scaling that has these factors, None where none has.

    factors: fp32 [head_dim / 2], what the frequency of each pair of dimensions is divided by.
    """
    if not np.all(np.isfinite(factors)) or factors.min() < LEAST_FLOAT:
        return None
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    wanted = factors.astype(np.float64)
    if np.allclose(wanted, 1.0, rtol=TOLERANCE, atol=0):
        return RopeScaling()
    factor = _nearest_short(float(wanted.max()))
    if factor <= 1.0:
        return None
    for low, high, positions in (*USUAL, *_solved(wanted, frequencies, factor)):
        if np.allclose(llama3_factors(frequencies, factor, low, high, positions), wanted, rtol=TOLERANCE, atol=0):
            return RopeScaling("llama3", factor, low, high, positions)
    return None


def llama3_factors(frequencies: np.ndarray, factor: float, low: float, high: float, positions: int) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by: fp64, as many as there are frequencies.

    Formula: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py, `apply_scaling`.
    """
    turns = positions * frequencies / (2 * np.pi)  # of a dimension within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _solved(factors: np.ndarray, frequencies: np.ndarray, factor: float) -> list[tuple[float, float, int]]:
    """The numbers by two interpolated factors: `smooth` is a straight line over the frequency. Of the three numbers in it two
    can be had, so `low_freq_factor` is 1, as in all models there are."""
    smooth = (1.0 / factors - 1.0 / factor) / (1.0 - 1.0 / factor)
    [between] = np.nonzero((smooth > 1e-4) & (smooth < 1 - 1e-4))
    if len(between) < 2:
        return []
    first, last = between[0], between[-1]
    slope = (smooth[first] - smooth[last]) / (frequencies[first] - frequencies[last])
    offset = slope * frequencies[first] - smooth[first]  # low / (high - low)
    if not (slope > 0 and offset > 0):
        return []
    high = _nearest_short(1.0 + 1.0 / offset)
    positions = round(slope * 2 * np.pi * (high - 1.0)) if slope < SIZE_LIMIT else 0
    return [(1.0, high, positions)] if 1.0 < high <= MOST_FLOAT and 1 <= positions < SIZE_LIMIT else []


def _nearest_short(value: float) -> float:
    """The number of three decimals that is meant, where it is that near."""
    short = round(value, 3)
    return short if short > 0 and abs(short - value) <= TOLERANCE * value else value
