"""All kinds of planted fault, and how to plant one."""

from __future__ import annotations

from random import Random

from scheduler.program import Program
from tests.mutations import end, experts, order, sync, work  # noqa: F401  each enters its kinds into MUTATIONS
from tests.mutations.draft import MUTATIONS, Draft, same

KINDS = tuple(MUTATIONS)
ATTEMPTS = 20


def plant(kind: str, program: Program, random: Random) -> Program | None:
    """A program with one fault of this kind at a random place; None where the program has no place for it."""
    for _ in range(ATTEMPTS):
        draft = Draft.of(program)
        if MUTATIONS[kind](draft, random):
            mutant = draft.program()
            if mutant is not None and not same(mutant, program):
                return mutant
    return None
