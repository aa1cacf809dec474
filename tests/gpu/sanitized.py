"""What runs under compute-sanitizer: a model of two layers decodes a few tokens on either side of a KV page's edge.

    python tests/gpu/sanitized.py

prints the tokens.  Everything is slower there by orders of magnitude, hence the patience.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from gpu_models import config_of, random_tokens, weights_of  # noqa: E402
from preparation import Case, programs_of  # noqa: E402

from bench.rig import Rig, device_sms  # noqa: E402
from instructions.base import GREEDY, SamplingState  # noqa: E402
from models.packed import pack  # noqa: E402

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
