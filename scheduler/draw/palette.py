"""One colour for each kind of instruction, the same in every picture.

Matplotlib's Tableau colours, but for two that mean something else here: red is the critical path, grey is signalling.  A new
instruction takes the next colour.
"""

from __future__ import annotations

from instructions.registry import INSTRUCTIONS

TABLEAU = ("#9467bd", "#1f77b4", "#ff7f0e", "#8c564b", "#2ca02c", "#e377c2", "#17becf", "#bcbd22", "#393b79", "#8c6d31")
MIXTURE = ("#f7b6d2", "#637939", "#98df8a", "#c5b0d5")  # of chosen experts, pale beside what they stand for
COLOURS: dict[str, str] = {
    kind.MNEMONIC: (*TABLEAU, *MIXTURE)[i % len((*TABLEAU, *MIXTURE))] for i, kind in enumerate(INSTRUCTIONS)
}
