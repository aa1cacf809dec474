"""How a random router is skewed: rows of unequal length, by which experts are chosen as Zipf's law has it.

A router has no bias, and on made-up weights what it multiplies has no direction in common from token to token.  So expert r's
score is normal, of mean 0, and only its scale can be chosen: that of the router's row.  The k best of n are those above a
threshold, nearly the same for every token.  A score of scale σ is above a threshold of 1 with the chance 1 - Φ(1/σ); for a
chance of p that gives σ = 1 / Φ⁻¹(1 - p), where p is below one half: no expert can be wanted by more than half of all tokens.
"""

from __future__ import annotations

from statistics import NormalDist

from models.errors import UserError

MOST_CHANCE = 0.45  # of the first expert: beyond, its scores would be tens of times the others'


def zipf_chances(experts: int, chosen: int, exponent: float) -> list[float]:
    """By expert, the share of tokens that choose it: r^-exponent for the r-th, all in all `chosen`."""
    weights = [rank**-exponent for rank in range(1, experts + 1)]
    return [chosen * weight / sum(weights) for weight in weights]


def zipf_scales(experts: int, chosen: int, exponent: float) -> list[float]:
    """By expert, the factor of its row of a router, of mean square 1: then `chosen` of `experts` are chosen by Zipf's law.

    Raises UserError for an exponent below 0, or so large that the first expert would be chosen by more than MOST_CHANCE of all
    tokens, with the largest that can be.
    """
    if not (exponent >= 0 and zipf_chances(experts, chosen, exponent)[0] <= MOST_CHANCE):
        most = largest_exponent(experts, chosen)
        which = "none can" if most is None else f"use 0 to {most:.2f}"
        raise UserError(
            f"a random router cannot choose {chosen} of {experts} experts by Zipf's law of exponent {exponent:g}: {which}"
        )
    scales = [1 / NormalDist().inv_cdf(1 - chance) for chance in zipf_chances(experts, chosen, exponent)]
    mean = (sum(scale * scale for scale in scales) / experts) ** 0.5
    return [scale / mean for scale in scales]


def largest_exponent(experts: int, chosen: int) -> float | None:
    """The largest exponent, rounded down to hundredths; None where even equal chances are too large."""
    most = None
    for hundredths in range(1000):
        if zipf_chances(experts, chosen, hundredths / 100)[0] > MOST_CHANCE:
            break
        most = hundredths / 100
    return most
