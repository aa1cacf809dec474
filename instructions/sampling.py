"""The arithmetic of sampling, in steps that the kernel repeats: thresholds by bisection, Gumbel noise by Philox.

A threshold is found by bisecting the 2^32 fp32 values in their numeric order, so it is a value that occurs among the
logits, found exactly, with no sort; the kernel runs the same 32 steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from instructions.base import SamplingState

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
MASK = np.uint64(0xFFFFFFFF)


def philox(rows: np.ndarray, position: int, seed: int) -> np.ndarray:
    """First 32-bit output of Philox4x32-10 (Salmon et al., 2011) for counters (row, position, 0, 0), uint32 [n].

    `rows` is an integer array [n]; the key is the low and the high 32 bits of `seed` (taken modulo 2^64).
    """
    c0 = rows.astype(np.uint64) & MASK
    c1 = np.full_like(c0, position & 0xFFFFFFFF)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * np.uint64(PHILOX_M[0]), c2 * np.uint64(PHILOX_M[1])
        c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + PHILOX_W[0]) & 0xFFFFFFFF, (k1 + PHILOX_W[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32)


def gumbel(rows: np.ndarray, position: int, seed: int) -> np.ndarray:
    """Gumbel noise -log(-log(u)), fp32 [n], with u = (bits >> 9 + 1/2) / 2^23, exact in fp32 and strictly within (0, 1)."""
    bits = (philox(rows, position, seed) >> np.uint32(9)).astype(np.float32)
    u = (bits + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(u))


def ordered(values: np.ndarray) -> np.ndarray:
    """fp32 values as int64 numbers in the same order, both zeros equal; NaN has no place in it."""
    bits = values.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def highest_threshold(enough: Callable[[int], bool], high: int = 2**31 - 1) -> int:
    """The largest ordered number up to `high` for which `enough` still holds; it must hold for small ones and be monotonic."""
    low = -(2**31)
    while low < high:
        middle = (low + high + 1) >> 1
        low, high = (middle, high) if enough(middle) else (low, middle - 1)
    return low


def kept_rows(z: np.ndarray, sampling: SamplingState) -> np.ndarray:
    """Which rows top_k and then top_p keep, bool [n]; z is logits / temperature, fp32 [n]."""
    keys = ordered(z)
    kept = np.ones(z.shape, dtype=bool)
    if 0 < sampling.top_k < z.size:
        k = sampling.top_k
        kept = keys >= highest_threshold(lambda key: int((keys >= key).sum()) >= k)
    if sampling.top_p < 1.0:
        weights = np.where(kept, np.exp((z - z.max()).astype(np.float64)), 0.0)
        target = float(np.float32(sampling.top_p)) * weights.sum()
        # not above the likeliest row: a top_p that is 0 in fp32 is met by no rows at all
        kept &= keys >= highest_threshold(lambda key: float(weights[keys >= key].sum()) >= target, int(keys.max()))
    return kept


def tempered(logits: torch.Tensor, temperature: float) -> np.ndarray:
    """Logits times the reciprocal of the temperature, both fp32."""
    return logits.numpy() * (np.float32(1.0) / np.float32(temperature))


def sampling_scores(logits: torch.Tensor, first_row: int, sampling: SamplingState, position: int) -> torch.Tensor:
    """What the arg max is taken of, for the logits [n] fp32 of rows first_row, first_row + 1, ...: fp32 [n]."""
    if sampling.temperature == 0.0:
        return logits
    rows = np.arange(first_row, first_row + logits.numel())
    return torch.from_numpy(tempered(logits, sampling.temperature) + gumbel(rows, position, sampling.seed))


def draw(logits: torch.Tensor, sampling: SamplingState, position: int) -> int:
    """Sample one of the rows that top_k and top_p keep, from logits [vocab] fp32 at `position`; ties go to the lowest."""
    z = tempered(logits, sampling.temperature)
    rows = np.flatnonzero(kept_rows(z, sampling))
    return int(rows[(z[rows] + gumbel(rows, position, sampling.seed)).argmax()])
