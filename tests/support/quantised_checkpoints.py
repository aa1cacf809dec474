"""Small checkpoints as compressed-tensors, AutoAWQ and GPTQ write them, packed by their descriptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.config import ModelConfig
from models.families.base import HEAD
from models.hf_config import hf_values
from models.weights import EMBEDDING
from tests.support.configs import random_tensors

GROUP = 128
CONFIG = ModelConfig(
    hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=96,
    max_position=64,
)  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Parts = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]


def words_of(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes [rows, 8 n] as int32 [rows, n]: the one at `order[i]` in bits 4 i."""
    out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i in range(8):
        out += codes[:, order[i] :: 8] << 4 * i
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def integers(weight: torch.Tensor, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K] from 0 to 15, fp16 scales and zero points [N, K / group], by the largest alone."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(2), groups.amax(2)
    if symmetric:
        scales, zeros = groups.abs().amax(2) / 7, torch.full_like(low, 8)
    else:
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(1, 14)
    scales = scales.half().float()
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int64), scales.half(), zeros.to(torch.int64)


def numbers(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """What they stand for, fp32 [N, K]."""
    width = codes.shape[1] // scales.shape[1]
    spread = scales.float().repeat_interleave(width, 1), zeros.float().repeat_interleave(width, 1)
    return (codes.float() - spread[1]) * spread[0]


def float8(channel: bool) -> Writer:
    """FP8 with a scale a row or a tensor."""

    def write(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        most = weight.abs().amax(1, keepdim=True) if channel else weight.abs().max().view(1)
        scale = (most / 448).bfloat16()
        codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()

    return write


def packed_integers(symmetric: bool, grouped: bool = True) -> Writer:
    """compressed-tensors' "pack-quantized"."""

    def write(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        codes, scales, zeros = integers(weight, GROUP if grouped else weight.shape[1], symmetric)
        parts = {"weight_packed": words_of(codes), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        if not symmetric:
            parts["weight_zero_point"] = words_of(zeros.T).T.contiguous()
        return parts, numbers(codes, scales, zeros)

    return write


def awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    codes, scales, zeros = integers(weight, GROUP, symmetric=False)
    parts = {"qweight": words_of(codes.T, AWQ_ORDER), "qzeros": words_of(zeros.T, AWQ_ORDER), "scales": scales.T.contiguous()}
    return parts, numbers(codes, scales, zeros)


def gptq(version: int, symmetric: bool) -> Writer:
    """With the trivial order of columns written down; the first version keeps zero points less 1."""

    def write(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        codes, scales, zeros = integers(weight, GROUP, symmetric)
        parts = {
            "qweight": words_of(codes).T.contiguous(),
            "qzeros": words_of((zeros - int(version == 1)).T),
            "scales": scales.T.contiguous(),
            "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
        }
        return parts, numbers(codes, scales, zeros)

    return write


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float"}
INT: dict[str, Any] = {"num_bits": 4, "type": "int"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
KINDS: dict[str, tuple[str, dict[str, Any], Writer]] = {
    "fp8 per tensor": ("fp8", compressed("float-quantized", **FLOAT8, strategy="tensor"), float8(channel=False)),
    "fp8 per channel": ("fp8", compressed("naive-quantized", **FLOAT8, strategy="channel"), float8(channel=True)),
    "int4 symmetric": ("int4", compressed("pack-quantized", **INT, strategy="group", group_size=128), packed_integers(True)),
    "int4 asymmetric": (
        "int4",
        compressed("pack-quantized", **INT | {"symmetric": False}, strategy="group", group_size=128),
        packed_integers(False),
    ),
    "int4 per channel": ("int4", compressed("pack-quantized", **INT, strategy="channel"), packed_integers(True, grouped=False)),
    "awq": ("int4", {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, awq),
    "gptq": ("int4", GPTQ | {"sym": True}, gptq(1, symmetric=True)),
    "gptq, asymmetric": ("int4", GPTQ | {"sym": False}, gptq(1, symmetric=False)),
    "gptq, second version": ("int4", GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, gptq(2, symmetric=False)),
}


def write_checkpoint(directory: Path, kind: str, head: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint of CONFIG, its layers' matrices quantised, with `head` that too; returns every tensor's numbers, in
    fp32 where it is quantised."""
    _, quantization, write = KINDS[kind]
    tensors, meant = {}, {}
    for name, tensor in random_tensors(CONFIG, seed=7).items():
        if tensor.ndim != 2 or name == EMBEDDING or (name == f"{HEAD}.weight" and not head):
            tensors[name] = meant[name] = tensor.bfloat16()
            continue
        parts, meant[name] = write(tensor)
        tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    values = hf_values(CONFIG) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(values))
    return meant
