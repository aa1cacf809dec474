"""Output projection + residual:  x_mid[layer] = x[layer] + (W_o round(attn[layer]) + b) * m.

See `instructions.projection`.  W_o: [hidden, heads * dp], its columns padded where a head's dimension is no multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from instructions.base import Activation
from instructions.projection import Projection


@dataclass(frozen=True)
class OProj(Projection):
    """A run of row blocks of the output projection."""

    OPCODE = 5
    MNEMONIC = "o_proj"
    MATRIX, SOURCE, RESIDUAL, TARGET, TARGET_LAYER = "o", "attn", "x", "x_mid", 0
    SHORT, APART = True, True
    BRINGS = (Activation("x_mid", lambda shape: shape.config.hidden_size),)
