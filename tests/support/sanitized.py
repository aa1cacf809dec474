"""What runs under compute-sanitizer: a model of two layers decodes a few tokens on either side of a KV page's edge.

    python -m tests.support.sanitized

prints the tokens.  Everything is slower there by orders of magnitude, hence the patience.
"""

from __future__ import annotations

import torch

from bench.rig import Rig, device_sms
from instructions.base import GREEDY, SamplingState
from models.packed import pack
from tests.support.gpu_models import config_of, random_tokens, weights_of
from tests.support.preparation import Case, programs_of

CASE = Case("gqa4_llama3_tied", 256, 131, 126, ((1, 1), (2, 2)))
PATIENCE = 20_000_000_000  # clock cycles: about ten seconds


def decoded() -> list[int]:
    """Greedy tokens from the start, then on both sides of the edge, then some drawn under top_k and top_p."""
    rig = Rig(
        pack(weights_of(CASE.name), config_of(CASE.name), torch.bfloat16, CASE.capacity),
        programs_of(CASE, device_sms()),
        patience=PATIENCE,
    )
    prompt = random_tokens(CASE.name, CASE.prompt)
    found = []
    for sampling in (GREEDY, SamplingState(1.0, 20, 0.9, 3)):
        rig.start(prompt[:2], sampling)
        found += rig.decode(0, 3)
    rig.start(prompt)
    return found + rig.decode(CASE.prompt - 1, CASE.positions - CASE.prompt)


if __name__ == "__main__":
    print(decoded())
