"""Down projection + residual:  x[layer + 1] = x_mid[layer] + (W_down round(mlp[layer]) + b) * m.

W_down: [hidden, intermediate].  See `instructions.projection`.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.projection import Projection


@dataclass(frozen=True)
class Down(Projection):
    """A run of row blocks of the down projection."""

    OPCODE = 7
    MNEMONIC = "down"
    MATRIX, SOURCE, RESIDUAL, TARGET, TARGET_LAYER = "down", "mlp", "x_mid", "x", 1
