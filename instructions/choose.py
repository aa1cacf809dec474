"""Choice of a layer's experts: the k best scores, and their shares of the softmax.

    e_0, ..., e_{k-1}: the experts of the k largest scores, the largest first, of equal scores the lower number first
    w_j = exp(s_{e_j} - m) / sum exp(s_e - m),  m = max s        the sum over all experts, or where shares are renormalised over
                                                                 e_0 to e_{k-1}     (Shazeer et al., 2017)

What it writes, choice[layer], are k numbers of experts and then their k weights.  Loaders look for the numbers themselves:
`ExpertGateUp` and `ExpertDown` select their pages by them.  A slot j of the k is one of an instruction's fields, so which pages
pass through the ring is known only at run time, but how many is known before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Activation, Cost, Instruction, Machine, Pages, Region
from instructions.dimensions import Dimensions
from instructions.sampling import ordered


@dataclass(frozen=True)
class Choose(Instruction):
    """One a layer."""

    OPCODE = 12
    MNEMONIC = "choose"
    LAYERED, SHORT = True, True
    BRINGS = (Activation("choice", lambda shape: 2 * shape.config.experts_per_token),)

    @classmethod
    def foreign(cls, shape: Dimensions) -> str | None:
        return None if shape.config.num_experts else "chooses experts in a model without any"

    def reads(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("scores", self.layer, 0, shape.config.num_experts),)

    def writes(self, shape: Dimensions) -> tuple[Region, ...]:
        return (Region("choice", self.layer, 0, 2 * shape.config.experts_per_token),)

    def cost(self, shape: Dimensions, past: int) -> Cost:
        return Cost(0, shape.config.num_experts**2)

    def execute(self, machine: Machine) -> Pages:
        config = machine.shape.config
        scores = machine.read(self.reads(machine.shape)[0])
        keys = torch.from_numpy(ordered(scores.numpy()))
        experts = keys.sort(descending=True, stable=True).indices[: config.experts_per_token]
        shares = torch.exp(scores - scores[experts[0]])
        total = shares[experts].sum() if config.renormalised else shares.sum()
        machine.write(self.writes(machine.shape)[0], torch.cat((experts.float(), shares[experts] / total)))
        yield from ()
