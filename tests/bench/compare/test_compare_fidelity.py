"""KL, NLL and greedy agreement against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.compare.fidelity import NEAR_TIE, distances, log_softmax, parting, surely_worse

ROWS = np.log(np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], dtype=np.float32))


def test_the_same_distributions_are_no_distance_apart() -> None:
    """Logits shifted by a constant are the same distribution; fp32 holds them to 2^-24 of their size, here below 8."""
    found = distances(ROWS + 5, ROWS, [0, 2])
    assert found.kl == pytest.approx([0.0, 0.0], abs=8 * 2**-24)
    assert found.nll == pytest.approx([-np.log(0.5), -np.log(0.75)], rel=1e-6)
    assert found.reference_nll == pytest.approx(found.nll, rel=1e-6)
    assert found.same_top == (True, True)


def test_kl_weighs_by_the_reference() -> None:
    """KL(p || q) with p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): 1/2 ln 2 - 1/4 ln 2."""
    engine = np.log(np.array([[0.25, 0.5, 0.25]], dtype=np.float32))
    found = distances(engine, ROWS[:1], [1])
    assert found.kl == pytest.approx([0.25 * np.log(2)], rel=1e-6)
    assert found.nll == pytest.approx([np.log(2)], rel=1e-6) and found.reference_nll == pytest.approx([2 * np.log(2)], rel=1e-6)
    assert found.same_top == (False,)


def test_log_softmax_survives_large_logits() -> None:
    assert log_softmax(np.array([1e4, 1e4 - 1], dtype=np.float32)) == pytest.approx(
        [-np.log1p(np.exp(-1)), -1 - np.log1p(np.exp(-1))]
    )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_no_distribution_is_refused(value: float) -> None:
    broken = ROWS.copy()
    broken[1, 0] = value
    with pytest.raises(ValueError, match="position 1 "):
        distances(broken, ROWS, [0, 2])


def test_rows_must_match() -> None:
    with pytest.raises(ValueError):
        distances(ROWS, ROWS, [0])


def test_parting_at_a_near_tie_and_at_none() -> None:
    """Logits with a standard deviation of 1 where they part; 1 and 2 stand within and beyond the threshold of each other."""
    logits = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    logits[1] = (logits[1] - logits[1].mean()) / logits[1].std()
    spread = float(logits[1].std())
    logits[1, 7] = 4.0
    for gap in (0.9, 1.1):
        logits[1, 8] = 4.0 - gap * NEAR_TIE * spread
        found = parting([5, 8, 1], [5, 7, 9], logits)
        assert (found.agreed, found.tokens) == (1, 3)
        assert found.gap == pytest.approx(gap * NEAR_TIE * spread, rel=1e-4)
        assert found.near_tie == (gap < 1)


def test_no_parting() -> None:
    found = parting([1, 2], [1, 2], np.zeros((2, 3), dtype=np.float32))
    assert (found.agreed, found.tokens, found.gap, found.near_tie) == (2, 2, None, None)


@pytest.mark.parametrize("seed", range(5))
def test_chance_is_not_called_worse(seed: int) -> None:
    """Equal errors with 10 % of noise each: at three standard errors one pair in 741 would be called worse."""
    generator = np.random.default_rng(seed)
    base = generator.gamma(2.0, 1e-4, 128)
    noise = generator.normal(1.0, 0.1, (2, 128))
    assert not surely_worse(list(base * noise[0]), list(base * noise[1]))
    assert surely_worse(list(base * noise[0] * 1.2), list(base * noise[1])), "a fifth more error shows at 128 positions"
    assert not surely_worse(list(base * noise[1]), list(base * noise[0] * 1.2)), "less error is not worse"


def test_one_position_proves_nothing() -> None:
    assert not surely_worse([2.0], [1.0])
