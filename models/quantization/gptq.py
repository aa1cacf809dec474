"""Checkpoints of GPTQ (Frantar et al., arXiv:2210.17323) as AutoGPTQ and GPTQModel pack them: four bits in groups along K;
words hold eight columns, those of zero points eight output rows.

The first version of the layout keeps zero points less 1, the second ("gptq_v2") as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.errors import UserError
from models.formats.base import Codes
from models.formats.int4 import ZERO_BITS
from models.quantization.base import CODES_A_WORD, SCALES, Grouped, Part, Scheme, int4_of_groups, nibbles, require, spread

METHOD = "gptq"
VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 0}  # what is to be added to zero points


@dataclass(frozen=True)
class Gptq(Grouped):
    """See above."""

    added: int = 1

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = columns // self.format.group
        return {
            "qweight": Part(("I32",), ((columns // CODES_A_WORD, rows),)),
            "qzeros": Part(("I32",), ((groups, rows // CODES_A_WORD),)),
            "scales": Part(SCALES, ((groups, rows),)),
        }

    def optional(self, rows: int, columns: int) -> dict[str, Part]:
        return {"g_idx": Part(("I32",), ((columns,),))}

    def codes(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> Codes:
        order = torch.arange(columns) // self.format.group
        if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), order):
            raise UserError("g_idx puts columns of a group apart, which is not supported: quantise with desc_act false")
        zeros = nibbles(parts["qzeros"], 1).T.contiguous() + self.added
        if bool((zeros > ZERO_BITS).any()):
            raise UserError("a zero point of 16 is not supported: quantise with sym true")
        values = nibbles(parts["qweight"], 0).T.contiguous()
        return Codes(values, spread(parts["scales"].T, zeros.shape[1]), zeros)


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises `UserError` for one that is not read."""
    require(METHOD, config, {"bits": (4,), "desc_act": (False, None), "checkpoint_format": tuple(VERSIONS)})
    return Gptq(METHOD, int4_of_groups(METHOD, config.get("group_size")), VERSIONS[config.get("checkpoint_format")])
