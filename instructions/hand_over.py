"""Hand-over: the residual stream of the last layer is the one that prefill left for the token being decoded.

    x[layers - 1] = hidden         hidden, x: [hidden] fp32

It stands where `Embed` does in the program that ends a prompt.  Prefill has computed the layers before, for all positions, and
the keys and values of the last one; what is left is the last layer of the last token, its logits, and the choice of the next.
`hidden` is given with the launch and stays as it is throughout, like the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Cost, Instruction, Machine, Pages, Region
from instructions.dimensions import Dimensions


@dataclass(frozen=True)
class HandOver(Instruction):
    """One per token, in programs that begin with a hidden state; `layer` is their first.

    It takes the place of the last token as `Embed` does, so it waits for the same: the previous token's `Sample`.
    """

    OPCODE = 10
    MNEMONIC = "hand_over"
    LAYERED, SHORT = True, True

    def misfit(self, shape: Dimensions) -> str | None:
        if not shape.tail:
            return "takes a hidden state in a program that begins with the embedding"
        if self.layer != shape.first_layer:
            return f"hands over to layer {self.layer} of a program that begins with layer {shape.first_layer}"
        return None

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("token", 0, 0, 1),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("x", self.layer, 0, shape.config.hidden_size),)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        return Cost(0, 0)

    def execute(self, machine: Machine) -> Pages:
        shape = machine.shape
        machine.read(self.reads(shape)[0])
        machine.write(self.writes(shape)[0], machine.hidden())
        yield from ()
