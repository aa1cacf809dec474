"""Norm + LM head, for a run of row blocks of the vocabulary.

    h = round(rms_norm(x[layers], w)),  logits[rows] = W_head[rows] h

Each instruction also leaves the largest of its scores and that row's number in its slot of "best" (ties: the lowest row), so
`Sample` reads a few hundred values, not the whole vocabulary.  A score is the logit when decoding greedily, otherwise
logit / temperature + Gumbel noise: the arg max of those is a sample of the softmax (see `instructions.sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.matvec import matrix_input, rms_norm, row_blocks
from instructions.sampling import sampling_scores
from instructions.shape import BEST_FIELDS, Shape
from models.tape import BLOCK_ROWS, PAGE_BYTES


@dataclass(frozen=True)
class LmHead(Instruction):
    """Row blocks `block` to `block + blocks` of the head; `layer` is 0, `slot` its place in "best"."""

    OPCODE = 8
    MNEMONIC = "lm_head"

    block: int
    blocks: int
    slot: int

    def reads(self, shape: Shape) -> tuple[Region, ...]:
        return (Region("x", shape.config.num_layers, 0, shape.config.hidden_size),)

    def writes(self, shape: Shape) -> tuple[Region, ...]:
        stop = min((self.block + self.blocks) * BLOCK_ROWS, shape.config.vocab_size)
        return (
            Region("logits", 0, self.block * BLOCK_ROWS, stop),
            Region("best", 0, self.slot * BEST_FIELDS, (self.slot + 1) * BEST_FIELDS),
        )

    def page_uses(self, shape: Shape) -> int:
        return self.blocks * shape.matrix("head").pages_per_block

    def tape_page(self, shape: Shape) -> int:
        matrix = shape.matrix("head")
        return matrix.first_page + self.block * matrix.pages_per_block

    def cost(self, shape: Shape, past: int) -> Cost:
        return Cost(self.page_uses(shape) * PAGE_BYTES, 2 * self.page_uses(shape) * shape.page_elements)

    def execute(self, machine: Machine) -> Pages:
        shape, config = machine.shape, machine.shape.config
        matrix = shape.matrix("head")
        norm = machine.constants(shape.tape.norm_offset("final", 0), config.hidden_size)
        h = rms_norm(machine.read(self.reads(shape)[0]), norm, config.rms_eps)
        x = matrix_input(h, shape, matrix.pages_per_block * shape.page_columns)
        y = yield from row_blocks(machine, x, self.blocks, matrix.pages_per_block)
        logits, best = self.writes(shape)
        values = y.flatten()[: logits.stop - logits.start]
        scores = sampling_scores(values, logits.start, machine.sampling(), machine.past)
        row = int(torch.argmax(scores))  # the first of equals
        machine.write(logits, values)
        machine.write(best, torch.tensor([float(scores[row]), float(logits.start + row)]))
