"""The read floor of a comparison, on the GPU."""

from __future__ import annotations

import pytest

from bench.compare.floor import measure

pytestmark = pytest.mark.gpu


def test_the_fastest_way_gives_a_credible_rate() -> None:
    """More than caches would not give, and less than the data sheet's 4.8 TB/s of the fastest of these GPUs."""
    size = (1 << 30) + 12_345  # no whole number of pages
    found = measure(size)
    times = found["milliseconds"]
    assert isinstance(times, dict) and len(times) > 3 and "torch.sum" in times
    rate = found["bytes_per_second"]
    assert isinstance(rate, float) and 1e12 < rate < 4.8e12
    assert size / rate * 1e3 == pytest.approx(min(times.values()), rel=1e-3)
