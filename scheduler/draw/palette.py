"""One colour for each kind of instruction, the same in every picture.

The order is that of Matplotlib's Tableau colours but for grey, which means waiting here; a new instruction takes the next.
"""

from __future__ import annotations

from instructions.registry import INSTRUCTIONS

TABLEAU = ("#9467bd", "#1f77b4", "#ff7f0e", "#8c564b", "#2ca02c", "#d62728", "#17becf", "#bcbd22", "#e377c2")
COLOURS: dict[str, str] = {kind.MNEMONIC: TABLEAU[i % len(TABLEAU)] for i, kind in enumerate(INSTRUCTIONS)}
