"""Norm + gate/up + SwiGLU of the chosen experts, for a run of row blocks of one slot's.

    h = round(rms_norm(x_mid[layer], w)),  e = choice[layer][slot],  c = choice[layer][k + slot]
    g = W_gate,e h,  u = W_up,e h,  expert_mlp[layer][slot] = c * g * sigmoid(g) * u

The router's weight c multiplies here what the down projection would be multiplied by: so that is one product over all slots,
whose sum has a fixed order.  Row blocks are counted over all slots, those of slot 0 first.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Activation, Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.experts import ExpertRows
from instructions.gate_up import UNITS, swiglu
from instructions.matvec import Widening


@dataclass(frozen=True)
class ExpertGateUp(ExpertRows):
    """Row blocks `block` to `block + blocks` of the chosen experts' gate/up matrices, all of one slot."""

    OPCODE = 13
    MNEMONIC = "expert_gate_up"
    MATRIX = "expert_gate_up"
    SHORT = True
    BRINGS = (Activation("expert_mlp", lambda shape: shape.config.experts_per_token * shape.config.intermediate_size),)

    @classmethod
    def parts(cls, shape: Dimensions, layer: int) -> list[int]:
        return [shape.matrix(cls.MATRIX, layer).blocks] * shape.config.experts_per_token

    def split(self, shape: Dimensions) -> tuple[int, int]:
        """Its slot, and its first row block within the expert."""
        return divmod(self.block, self.matrix(shape).blocks)

    def slots(self, shape: Dimensions) -> range:
        slot, _ = self.split(shape)
        return range(slot, slot + 1)

    def field_ranges(self, shape: Dimensions, sms: int) -> dict[str, tuple[int, int]]:
        blocks = self.matrix(shape).blocks
        last = shape.config.experts_per_token * blocks - 1
        return {"block": (0, last), "blocks": (1, blocks - self.block % blocks)}

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        slot, k = self.split(shape)[0], shape.config.experts_per_token
        weight = Region("choice", self.layer, k + slot, k + slot + 1)
        return (Region("x_mid", self.layer, 0, shape.config.hidden_size), weight, *self.selects(shape))

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        (slot, block), units = self.split(shape), shape.config.intermediate_size
        stop = min((block + self.blocks) * UNITS, units)
        return (Region("expert_mlp", self.layer, slot * units + block * UNITS, slot * units + stop),)

    def tape_page(self, shape: Dimensions) -> int:
        matrix = self.matrix(shape)
        return matrix.first_page + self.split(shape)[1] * matrix.pages_per_block

    def place(self, shape: Dimensions, use: int) -> tuple[int, int]:
        return 0, use

    def execute(self, machine: Machine) -> Pages:
        y = yield from self.product(machine, self.normed(machine))
        gate, up = y[:, :UNITS].flatten(), y[:, UNITS:].flatten()
        weight = machine.read(self.reads(machine.shape)[1])
        region = self.writes(machine.shape)[0]
        machine.write(region, weight * swiglu(gate, up)[: region.stop - region.start])

    def widening(self, machine: Machine) -> Widening | None:
        if self.matrix(machine.shape).format.plain:
            return None
        [expert] = self.experts(machine)
        return self.widened(machine, self.beside(machine, expert, self.split(machine.shape)[1], self.blocks))
