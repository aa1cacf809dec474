"""Drafts by looking up: tokens that may come next, taken from where the last ones stood before (prompt lookup: Saxena, 2023).

Of the places where the sequence's last token stood before, the one counts where most of the tokens before it agree, too: at
least LEAST tokens in all, counted up to MOST; of equals, the latest.  What followed there is the draft.  Where that runs into
the
sequence's own end, it goes on with the draft itself, as what repeats does.

A draft is right if it is the token that would be chosen anyway, so it decides how fast a text comes, never what it says.  The
kernel does the same for itself, so that a launch of many steps needs no host.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST, MOST = 2, 3  # tokens that agree
WINDOW = 16384  # the latest places that are looked at


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens that may follow; [] where no place agrees."""
    end = len(tokens) - 1
    best, place = 0, 0
    for i in range(max(0, end - WINDOW), end):
        agreed = agreement(tokens, i, end)
        if agreed >= max(best, LEAST):
            best, place = agreed, i
    if not best:
        return []
    period = end - place
    return [tokens[place + 1 + j % period] for j in range(most)]


def agreement(tokens: Sequence[int], i: int, end: int) -> int:
    """How many tokens agree, backwards from places i and end, up to MOST."""
    for count in range(MOST):
        if i < count or tokens[i - count] != tokens[end - count]:
            return count
    return MOST
