"""Checkpoints of compressed-tensors (llm-compressor): FP8 with a scale a tensor or a row, and four bits in groups or rows,
symmetric or not ("pack-quantized").

Their activations may be meant to be quantised, too; here they stay bf16, which is nearer to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.errors import UserError
from models.formats.base import Codes
from models.formats.fp8 import FP8, NOT_A_NUMBER
from models.quantization.base import (
    CODES_A_WORD,
    SCALES,
    Grouped,
    Part,
    Scheme,
    int4_of_groups,
    nibbles,
    refuse,
    require,
    spread,
)

METHOD = "compressed-tensors"
MIDDLE = 8  # what is added to a code of four bits before it is packed


@dataclass(frozen=True)
class FloatQuantized(Scheme):
    """FP8 in e4m3; a scale a tensor, or a row."""

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        shapes = ((), (1,), (1, 1), (rows, 1))
        return {"weight_scale": Part(SCALES, shapes), "weight": Part(("F8_E4M3",), ((rows, columns),))}

    def optional(self, rows: int, columns: int) -> dict[str, Part]:
        return {"input_scale": Part(SCALES, ((), (1,), (1, 1)))}

    def codes(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> Codes:
        values = parts["weight"].view(torch.uint8)
        if bool(((values & NOT_A_NUMBER) == NOT_A_NUMBER).any()):
            raise UserError("a weight in FP8 is no number: download the checkpoint anew")
        scales = parts["weight_scale"].float().view(-1, 1).expand(rows, -(-columns // FP8.group))
        return Codes(values, scales.contiguous())


@dataclass(frozen=True)
class PackQuantized(Grouped):
    """Four bits; a scale a group, or a row where `grouped` is False; with zero points where not `symmetric`."""

    symmetric: bool = True
    grouped: bool = True

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = columns // self.format.group if self.grouped else 1
        parts = {
            "weight_packed": Part(("I32",), ((rows, columns // CODES_A_WORD),)),
            "weight_scale": Part(SCALES, ((rows, groups),)),
            "weight_shape": Part(("I64", "I32"), ((2,),)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part(("I32",), ((rows // CODES_A_WORD, groups),))
        return parts

    def codes(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> Codes:
        if parts["weight_shape"].tolist() != [rows, columns]:
            raise UserError(f"weight_shape says {parts['weight_shape'].tolist()} of a matrix [{rows}, {columns}]: mend it")
        groups = columns // self.format.group
        scales = spread(parts["weight_scale"], groups)
        if self.symmetric:
            zeros = torch.full_like(scales, MIDDLE).to(torch.uint8)
        else:
            zeros = nibbles(parts["weight_zero_point"], 0).expand(-1, groups).contiguous()
        return Codes(nibbles(parts["weight_packed"], 1), scales, zeros)


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises `UserError` for one that is not read."""
    require(METHOD, config, {"kv_cache_scheme": (None,), "quantization_status": ("compressed", None)})
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise refuse(METHOD, "sparse weights")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise refuse(METHOD, "other than one group of config_groups")
    [group] = groups.values()
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise refuse(METHOD, "a group without weights")
    weights = group["weights"]
    require(METHOD, weights, {"dynamic": (False, None), "block_structure": (None,)})
    layout = group.get("format") or config.get("format")
    kind = (layout, weights.get("type"), weights.get("num_bits"))
    if kind in (("float-quantized", "float", 8), ("naive-quantized", "float", 8)):
        require(METHOD, weights, {"strategy": ("tensor", "channel"), "symmetric": (True, None)})
        return FloatQuantized(METHOD, FP8)
    if kind == ("pack-quantized", "int", 4):
        require(
            METHOD,
            weights,
            {"strategy": ("group", "channel"), "symmetric": (True, False), "actorder": (None, "weight", "static")},
        )
        grouped = weights["strategy"] == "group"
        format = int4_of_groups(METHOD, weights.get("group_size") if grouped else None, columns_too=not grouped)
        return PackQuantized(METHOD, format, weights["symmetric"], grouped)
    raise refuse(METHOD, f"{layout} of {weights.get('num_bits')} bits, type {weights.get('type')}")
