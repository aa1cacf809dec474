"""How far an engine's next-token distributions lie from the fp32 reference's, and where its greedy tokens part from its.

Arithmetic on arrays; it knows neither engines nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR_TIE = 0.05  # of the standard deviation of the reference's logits at that position, see docs/comparison.md
SURE = 3.0  # standard errors by which an engine must be worse than the baseline to be called so

Array = np.ndarray


@dataclass(frozen=True)
class Distances:
    """Per position: KL(reference || engine) and minus the log-probability of the true token, in nats; and whether both
    have the same likeliest token."""

    kl: tuple[float, ...]
    nll: tuple[float, ...]
    reference_nll: tuple[float, ...]
    same_top: tuple[bool, ...]


@dataclass(frozen=True)
class Parting:
    """Greedy tokens in common before the first difference, and at that difference the reference's logit of its own token
    less that of the engine's, absolute and in standard deviations of its logits there (None: there is no difference)."""

    agreed: int
    tokens: int
    gap: float | None = None
    relative_gap: float | None = None

    @property
    def near_tie(self) -> bool | None:
        return None if self.relative_gap is None else self.relative_gap <= NEAR_TIE


def log_softmax(logits: Array) -> Array:
    """In fp64; also of log-probabilities, which it leaves as they are.  [vocabulary]"""
    shifted = logits.astype(np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def distances(engine: Array, reference: Array, targets: Sequence[int]) -> Distances:
    """Compare logits or log-probabilities, both [positions, vocabulary], whose true next tokens are `targets`.

    Raises ValueError where an engine's row is no distribution: a NaN, or no chance at all for a token that the reference
    thinks possible.
    """
    kl, nll, reference_nll, same = [], [], [], []
    for row, judge, target in zip(engine, reference, targets, strict=True):
        ours, true = log_softmax(row), log_softmax(judge)
        kl.append(float(np.sum(np.exp(true) * (true - ours))))
        nll.append(float(-ours[target]))
        reference_nll.append(float(-true[target]))
        same.append(bool(ours.argmax() == true.argmax()))
        if not np.isfinite(kl[-1] + nll[-1]):
            raise ValueError(f"the distribution at scored position {len(kl) - 1} holds values that are not finite")
    return Distances(tuple(kl), tuple(nll), tuple(reference_nll), tuple(same))


def parting(engine: Sequence[int], reference: Sequence[int], logits: Array) -> Parting:
    """Where two greedy continuations part; `logits` [tokens, vocabulary] are those that the reference chose from, which
    at the first difference still had the same past."""
    for place, (ours, true) in enumerate(zip(engine, reference, strict=True)):
        if ours != true:
            row = logits[place].astype(np.float64)
            gap = float(row[true] - row[ours])
            return Parting(place, len(reference), gap, gap / float(row.std()))
    return Parting(len(reference), len(reference))


def surely_worse(engine: Sequence[float], baseline: Sequence[float]) -> bool:
    """Whether the mean over positions is above the baseline's by more than chance: by over three standard errors of the
    difference, position by position (which cancels how hard each position is)."""
    difference = np.subtract(engine, baseline)
    if len(difference) < 2:
        return False
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return bool(difference.mean() > SURE * error)
