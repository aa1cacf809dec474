"""How sequences share a cache: nobody's rows are written by another, and what is said to be there is there."""

from __future__ import annotations

import random

import pytest

from megakernel.parts import BLOCK, Parts
from megakernel.request import SamplingParams
from megakernel.sequence import Sequence

ROWS = 20 * BLOCK


class Rows:
    """Parts of a cache that holds token ids, one a row."""

    def __init__(self, capacity: int = ROWS) -> None:
        self.parts = Parts(capacity, self.copy)
        self.rows = [-1] * (self.parts.blocks * BLOCK)

    def copy(self, source: int, target: int) -> None:
        self.rows[target * BLOCK : (target + 1) * BLOCK] = self.rows[source * BLOCK : (source + 1) * BLOCK]

    def place(self, sequence: Sequence, position: int) -> int:
        block, row = divmod(position, BLOCK)
        return sequence.part[block] * BLOCK + row

    def write(self, sequence: Sequence, tokens: int) -> None:
        """Compute the next positions of a sequence, choosing tokens where it has none left."""
        for _ in range(tokens):
            self.rows[self.place(sequence, sequence.position)] = sequence.tokens[sequence.position]
            sequence.position += 1
            if sequence.position == len(sequence.tokens):
                sequence.take([sequence.position % 7])
            if sequence.ended:
                break

    def check(self, sequence: Sequence) -> None:
        held = [self.rows[self.place(sequence, position)] for position in range(sequence.position)]
        assert held == sequence.tokens[: sequence.position]


def asked(prompt: list[int], limit: int = 1, reuse: bool = True) -> Sequence:
    return Sequence(prompt, limit, SamplingParams(), reuse)


def answered(rows: Rows, prompt: list[int], limit: int = 1) -> Sequence:
    """A sequence that has joined, ended and left."""
    sequence = asked(prompt, limit)
    assert rows.parts.join(sequence)
    rows.write(sequence, ROWS)
    rows.parts.leave(sequence)
    return sequence


def test_the_answers_to_one_prompt_share_its_blocks() -> None:
    rows, prompt = Rows(), list(range(3 * BLOCK + 5))
    first, second, third = asked(prompt, 20), asked(prompt, 20), asked(prompt, 20, reuse=False)
    for sequence in (first, second, third):
        assert rows.parts.join(sequence) and sequence.kept == 0
    rows.write(first, len(prompt))
    rows.parts.join_again(second)
    assert second.kept == second.position == len(prompt) - 1
    assert second.part[:3] == first.part[:3] and not set(second.part[3:]) & set(first.part)
    rows.parts.join_again(third)
    assert third.kept == 0 and not set(third.part) & {*first.part, *second.part}
    rows.check(second)
    for sequence in (first, second, third):
        rows.write(sequence, ROWS)
    for sequence in (first, second, third):
        rows.check(sequence)


def test_the_next_turn_goes_on_where_the_last_one_ended() -> None:
    rows = Rows()
    first = answered(rows, list(range(BLOCK + 3)), 10)
    second = asked([*first.tokens, 5, 6], 10)
    assert rows.parts.join(second)
    assert second.kept == len(first.tokens) - 1, "its last token was never read"
    assert second.part == list(range(len(second.part))), "in one piece, its last block taken over"
    rows.check(second)
    assert rows.parts.held == []


def test_what_was_unused_for_longest_makes_room() -> None:
    rows = Rows()
    conversations = [answered(rows, [number] * (5 * BLOCK), BLOCK) for number in range(3)]
    assert len(rows.parts.held) == 3
    used = asked([*conversations[0].tokens[: 2 * BLOCK], 9])
    assert rows.parts.join(used) and used.kept == 2 * BLOCK
    rows.parts.leave(used)
    assert rows.parts.join(asked([8] * (6 * BLOCK)))
    assert [held.tokens[0] for held in rows.parts.held] == [2, 0, 0], "the first was used since, and so were its blocks"


def test_what_does_not_fit_changes_nothing() -> None:
    rows = Rows()
    answered(rows, [1] * BLOCK)
    first, second = asked([2] * (12 * BLOCK)), asked([3] * (8 * BLOCK), 2)
    assert rows.parts.join(first)
    known = (list(rows.parts.running), list(rows.parts.held))
    assert not rows.parts.join(second) and second.part == []
    assert (rows.parts.running, rows.parts.held) == known
    rows.parts.leave(second)  # which has not joined
    rows.parts.leave(first)
    assert rows.parts.join(second)


@pytest.mark.parametrize("capacity", [BLOCK - 5, ROWS - 3, ROWS])
def test_one_sequence_may_have_all(capacity: int) -> None:
    """Whatever the cache holds, and also where it goes on from a part of that."""
    rows = Rows(capacity)
    for shared in (0, 1, 7, capacity // 2, capacity - 3):
        before = answered(rows, [3, 1, 4, 1, 5], capacity - 5)
        whole = asked([*before.tokens[:shared], 9], capacity - shared - 1)
        assert rows.parts.join(whole) and whole.kept == shared
        rows.check(whole)
        rows.write(whole, capacity)
        rows.check(whole)
        rows.parts.leave(whole)


@pytest.mark.parametrize("seed", range(4))
def test_random_joins_and_leaves(seed: int) -> None:
    """Prompts of few different beginnings; every row that a sequence relies on is its own or was when it was shared."""
    draw, rows, running = random.Random(seed), Rows(), list[Sequence]()
    waited = kept = 0
    for _ in range(1500):
        if len(running) < 8 and draw.random() < 0.3:
            lists = [one.tokens for one in running] + [held.tokens for held in rows.parts.held]
            known = draw.choice(lists or [[1]])
            prompt = [*known[: draw.randrange(len(known) + 1)], *(draw.randrange(3) for _ in range(draw.randrange(1, 9)))]
            sequence = asked(prompt[: ROWS - 1], draw.randrange(1, max(2, min(60, ROWS - len(prompt)))))
            if rows.parts.join(sequence):
                rows.check(sequence)
                kept += sequence.kept
                running.append(sequence)
            else:
                waited += 1
        for sequence in list(running):
            if sequence.position == sequence.kept and draw.random() < 0.5:
                rows.parts.join_again(sequence)
            rows.write(sequence, draw.randrange(12))
            rows.check(sequence)
            if sequence.ended or draw.random() < 0.01:
                running.remove(sequence)
                rows.parts.leave(sequence)
        own = [block for one in running for block in one.part[one.kept // BLOCK :]]
        assert len(own) == len(set(own)), "no two write the same block"
    assert waited and kept
