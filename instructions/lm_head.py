"""Norm + LM head, for a run of row blocks of the vocabulary.

    h = round(rms_norm(x[layers], w)),  logits[rows] = W_head[rows] h / logits_scaling

Each instruction also leaves the largest of its scores and that row's number in its slot of "best" (ties: the lowest row), so
`Sample` reads a few hundred values, not the whole vocabulary.  A score is the logit when decoding greedily, otherwise
logit / temperature + Gumbel noise: the arg max of those is a sample of the softmax (see `instructions.sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Activation, Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.matvec import RowBlocks
from instructions.sampling import sampling_scores
from models.tape import BLOCK_ROWS

BEST_FIELDS = 2  # per instruction: the largest logit and its row


@dataclass(frozen=True)
class LmHead(RowBlocks):
    """Row blocks `block` to `block + blocks` of the head; `layer` is 0, `slot` its place in "best"."""

    OPCODE = 8
    MNEMONIC = "lm_head"
    MATRIX = "head"
    LAYERED = False
    BRINGS = (
        Activation("logits", lambda shape: shape.config.vocab_size, lambda shape: 1, announced=False),
        Activation("best", lambda shape: BEST_FIELDS * shape.matrix("head").blocks, lambda shape: 1, announced=False),
    )

    slot: int

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        return {**super().field_ranges(shape, sms), "slot": (0, sms - 1)}  # `Sample` looks at one slot for each SM

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x", shape.config.num_layers, 0, shape.config.hidden_size),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        stop = min((self.block + self.blocks) * BLOCK_ROWS, shape.config.vocab_size)
        return (
            Region("logits", 0, self.block * BLOCK_ROWS, stop),
            Region("best", 0, self.slot * BEST_FIELDS, (self.slot + 1) * BEST_FIELDS),
        )

    def execute(self, machine: Machine) -> Pages:
        y = yield from self.product(machine, self.normed(machine))
        logits, best = self.writes(machine.shape)
        values = y.flatten()[: logits.stop - logits.start] * machine.shape.logits_multiplier
        scores = sampling_scores(values, logits.start, machine.sampling(), machine.past)
        row = int(torch.argmax(scores))  # the first of equals
        machine.write(logits, values)
        machine.write(best, torch.tensor([float(scores[row]), float(logits.start + row)]))
