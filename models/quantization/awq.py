"""Checkpoints of AWQ (Lin et al., arXiv:2306.00978) as AutoAWQ packs them for its GEMM: four bits in groups along K, with zero
points; words hold eight output rows, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.formats.base import Codes
from models.quantization.base import CODES_A_WORD, SCALES, Grouped, Part, Scheme, int4_of_groups, nibbles, require, spread

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq(Grouped):
    """See above."""

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = columns // self.format.group
        return {
            "qweight": Part(("I32",), ((columns, rows // CODES_A_WORD),)),
            "qzeros": Part(("I32",), ((groups, rows // CODES_A_WORD),)),
            "scales": Part(SCALES, ((groups, rows),)),
        }

    def codes(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> Codes:
        values, zeros = (nibbles(parts[name], 1, ORDER).T.contiguous() for name in ("qweight", "qzeros"))
        return Codes(values, spread(parts["scales"].T, zeros.shape[1]), zeros)


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises `UserError` for one that is not read."""
    bits = {"bits": config.get("bits", config.get("w_bit")), "version": str(config.get("version", "gemm")).lower()}
    zero_point = config.get("zero_point")
    require(METHOD, bits | {"zero_point": zero_point}, {"bits": (4,), "version": ("gemm",), "zero_point": (True, None)})
    return Awq(METHOD, int4_of_groups(METHOD, config.get("group_size", config.get("q_group_size"))))
