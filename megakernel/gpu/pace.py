"""Whether to draft: what it would have gained lately, and what it does gain, decide launch by launch.

A step of several columns takes a little longer than one of a single column, so it pays only where drafts are right often
enough.  While the host decodes one token a step, it drafts for itself, which costs no GPU time, and counts how often it would
have been right; while the GPU drafts, the tokens that a step makes tell.  The text is the same either way.
"""

from __future__ import annotations

from collections import deque

from instructions.drafts import LEAST, MOST

TRIAL = 8  # steps after a prompt for which drafts are tried: a hundredth of a long answer
WORTH = 1.3  # tokens a step below which drafting ends
HITS, OF = 6, 16  # drafts that would have been right, of the last so many tokens, from which on it begins


class Index:
    """Where each run of LEAST to MOST tokens stood last, kept up token by token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}

    def add(self, token: int) -> bool:
        """The next token; returns whether it is the one that would have been drafted."""
        right = self.draft() == token
        for count in range(LEAST, MOST + 1):
            if len(self.tokens) >= count:
                self.places[tuple(self.tokens[-count:])] = len(self.tokens)
        self.tokens.append(token)
        return right

    def draft(self) -> int | None:
        """The token that followed where most of the last ones stood before."""
        for count in range(MOST, LEAST - 1, -1):
            place = self.places.get(tuple(self.tokens[-count:])) if len(self.tokens) >= count else None
            if place is not None:
                return self.tokens[place]
        return None


class Pace:
    """Says whether the next launch drafts."""

    def __init__(self, prompt: list[int]) -> None:
        self.index = Index()
        for token in prompt:
            self.index.add(token)
        self.hits: deque[bool] = deque(maxlen=OF)
        self.drafting = True  # for a trial
        self.steps = self.made = 0  # of the launches since drafting began

    def landed(self, tokens: list[int], steps: int) -> None:
        """A launch of so many steps of several columns has made these tokens; 0 steps: one column made them."""
        hits = [self.index.add(token) for token in tokens]
        self.hits.extend(hits)
        if steps:
            self.steps, self.made = self.steps + steps, self.made + len(tokens)
            if self.steps >= TRIAL:
                self.drafting = self.made >= WORTH * self.steps
                self.steps = self.made = 0
                self.hits.clear()
        elif sum(self.hits) >= HITS:
            self.drafting = True
            self.hits.clear()
