"""Sampling: choose the next token from the logits, append it, check it against the stop tokens, advance the position.

Greedy (temperature 0): the row of the largest logit.  Otherwise: z = logits / temperature; `top_k` keeps the rows whose z is
not below the k-th largest; `top_p` then keeps the fewest of the largest whose probabilities sum to at least top_p (Holtzman
et al., 2019); the token is the arg max over the kept rows of z + g, with g Gumbel noise drawn per row from Philox (seed,
row, position), which samples exactly from the kept softmax (Gumbel, 1954) and needs no second pass.

With no top_k and no top_p every row is kept, and the answer is the best of the LM head's `slots` best rows; only a cut needs
the logits themselves.  Ties go to the lowest row.  See `instructions.sampling`.

Advance and stop check are merged here because they depend on nothing but the chosen token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.lm_head import BEST_FIELDS
from instructions.sampling import draw


@dataclass(frozen=True)
class Sample(Instruction):
    """One per token, the last; `layer` is 0, `slots` the number of `LmHead` instructions."""

    OPCODE = 9
    MNEMONIC = "sample"
    LAYERED, SHORT = False, True

    slots: int

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {"slots": (1, sms)}

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        best = Region("best", 0, 0, self.slots * BEST_FIELDS)
        return (Region("logits", 0, 0, shape.config.vocab_size), best)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("token", 0, 0, 1),)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        return Cost(0, 2 * self.slots)

    def execute(self, machine: Machine) -> Pages:
        logits, best = (machine.read(region) for region in self.reads(machine.shape))
        if bool(torch.isinf(logits).any()):
            raise ValueError("some logits are infinite: the model's numbers overflow")
        sampling = machine.sampling()
        if sampling.cuts:
            token = draw(logits, sampling, machine.past)
        else:
            scores, rows = best.view(self.slots, BEST_FIELDS).unbind(1)
            token = int(rows[scores == scores.max()].min())
        machine.emit(token)
        yield from ()
