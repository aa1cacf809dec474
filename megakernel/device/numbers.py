"""Arithmetic on numbers that are known when a kernel is compiled."""

from __future__ import annotations

from triton.experimental import gluon


@gluon.constexpr_function
def largest_divisor(n, most):
    """The largest power of two that divides n and is at most `most`."""
    d = 1
    while d * 2 <= most and n % (d * 2) == 0:
        d *= 2
    return d


@gluon.constexpr_function
def power_of_two(n):
    """The smallest power of two not below n."""
    return 1 << (n - 1).bit_length()
