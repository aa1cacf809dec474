"""Embedding: the residual stream of layer 0 is the embedding row of the token being decoded.

    x[0] = E[token] * embedding_multiplier        E: [vocab, hidden] in the weight type, x: [hidden] fp32

The row is gathered from the weight tape (with a tied head there is one copy of the matrix in memory), 128 bytes a K tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Activation, Cost, Instruction, Machine, Pages, Region
from instructions.dimensions import Dimensions


@dataclass(frozen=True)
class Embed(Instruction):
    """One per token; waits for the previous token's `Sample`."""

    OPCODE = 1
    MNEMONIC = "embed"
    LAYERED, SHORT = False, True
    BRINGS = (Activation("x", lambda shape: shape.config.hidden_size, lambda shape: shape.config.num_layers + 1),)

    def misfit(self, shape: Dimensions) -> str | None:
        return "embeds a token in a program that begins with a hidden state" if shape.tail else None

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("token", 0, 0, 1),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x", 0, 0, shape.config.hidden_size),)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        return Cost(shape.config.hidden_size * shape.itemsize, 0)

    def execute(self, machine: Machine) -> Pages:
        shape = machine.shape
        machine.read(self.reads(shape)[0])
        machine.write(self.writes(shape)[0], machine.embedding(machine.token()) * shape.config.embedding_multiplier)
        yield from ()
