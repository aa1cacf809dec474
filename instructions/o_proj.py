"""Output projection + residual:  x_mid[layer] = x[layer] + W_o round(attn[layer]) + b.  See `instructions.projection`.

W_o: [hidden, heads * dp], its columns padded where a head's dimension is no multiple of 16.  Where attention left a few
slices, they are merged here, by the formula of `instructions.combine`: every SM reads all of them, which costs less than the
dependency hop of a `Combine`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from instructions.base import Machine, Region
from instructions.combine import merge_slices
from instructions.projection import Projection
from instructions.shape import Shape


@dataclass(frozen=True)
class OProj(Projection):
    """A run of row blocks of the output projection."""

    OPCODE = 5
    MNEMONIC = "o_proj"
    MATRIX, SOURCE, RESIDUAL, TARGET, TARGET_LAYER = "o", "attn", "x", "x_mid", 0

    def source(self, shape: Shape) -> Region:
        name = "partial" if shape.merges else self.SOURCE
        return Region(name, self.layer, 0, shape.buffers[name].rows)

    def input(self, machine: Machine) -> torch.Tensor:
        shape = machine.shape
        values = super().input(machine)
        if not shape.merges:
            return values
        return merge_slices(values.view(shape.config.num_kv_heads, shape.slices, shape.partial_rows), shape)
