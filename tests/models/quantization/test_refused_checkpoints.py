"""What a checkpoint quantises in a way that is not read, or holds of no use, is refused by name, with a mend, before weights
are read; what only the values show, when they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import open_checkpoint
from models.errors import UserError
from models.packed import pack
from tests.support.quantised_checkpoints import FLOAT8, GPTQ, INT, compressed, write_checkpoint

UP = "model.layers.1.mlp.up_proj."
GROUPS = compressed("pack-quantized", **INT, strategy="group", group_size=128)["config_groups"]
CONFIGS: dict[str, tuple[Any, list[str]]] = {
    "no object": ([4], ["quantization_config is no object"]),
    "no method": ({"bits": 4}, ["method None is not supported", "compressed-tensors, awq, gptq"]),
    "another method": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'"]),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ["method 'fp8'"]),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, ["gptq with bits 8"]),
    "gptq in groups of 32": (GPTQ | {"group_size": 32}, ["gptq with groups of 32", "groups of 128"]),
    "gptq without groups": (GPTQ | {"group_size": -1}, ["groups of -1"]),
    "gptq by activation": (GPTQ | {"desc_act": True}, ["desc_act True"]),
    "gptq for Marlin": (GPTQ | {"checkpoint_format": "marlin"}, ["checkpoint_format 'marlin'"]),
    "awq for GEMV": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, ["version 'gemv'"]),
    "awq in groups of 64": ({"quant_method": "awq", "bits": 4, "group_size": 64}, ["groups of 64"]),
    "int8": (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), ["int-quantized of 8 bits"]),
    "nvfp4": (compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="group"), ["nvfp4-pack-quantized"]),
    "fp8 in groups": (compressed("float-quantized", **FLOAT8, strategy="block"), ["strategy 'block'"]),
    "int4 in groups of 64": (compressed("pack-quantized", **INT, strategy="group", group_size=64), ["groups of 64"]),
    "int4 by activation": (
        compressed("pack-quantized", **INT, strategy="group", group_size=128, actorder="group"),
        ["actorder 'group'"],
    ),
    "two schemes": (compressed("x") | {"config_groups": GROUPS | {"group_1": GROUPS["group_0"]}}, ["one group"]),
    "a quantised cache": (compressed("x") | {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
    "sparse": (compressed("x") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse weights"]),
    "a group of nothing": (compressed("x") | {"config_groups": {"group_0": None}}, ["a group without weights"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_schemes_that_are_not_read(case: str, tmp_path: Path) -> None:
    config, words = CONFIGS[case]
    write_checkpoint(tmp_path, "gptq")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(UserError) as refused:
        open_checkpoint(tmp_path)
    assert all(word in str(refused.value) for word in [str(path), *words]), refused.value
    assert "\n" not in str(refused.value)


Change = Callable[[dict[str, torch.Tensor]], None]


def without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


def widened(tensors: dict[str, torch.Tensor]) -> None:
    """One matrix as if it had been left out."""
    for part in ("qweight", "qzeros", "scales"):
        tensors.pop(UP + part)
    tensors[UP + "weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)


def spoiled(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return change


TENSORS: dict[str, tuple[str, Change, list[str]]] = {
    "no scales": ("awq", without(UP + "scales"), [UP + "scales is missing"]),
    "no zero points": ("int4 asymmetric", without(UP + "weight_zero_point"), ["weight_zero_point is missing"]),
    "a shape": ("gptq", put(UP + "qweight", lambda t: t[:-1]), [UP + "qweight has shape [15, 256]", "[16, 256]"]),
    "a type": ("awq", put(UP + "qzeros", lambda t: t.long()), ["qzeros is I64", "I32"]),
    "another scale": ("fp8 per tensor", put(UP + "weight_scale", lambda t: t.repeat(2)), ["weight_scale has shape [2]"]),
    "zero points of symmetric weights": (
        "int4 symmetric",
        lambda tensors: tensors.update({UP + "weight_zero_point": torch.zeros(32, 1, dtype=torch.int32)}),
        ["weight_zero_point is left over"],
    ),
    "some matrices only": ("awq", widened, [UP + "weight is not quantised while others are"]),
    "an infinite scale": ("awq", put(UP + "scales", spoiled(3, float("inf"))), ["a scale is no finite number"]),
    "FP8's NaN": (
        "fp8 per channel",
        put(UP + "weight", lambda t: spoiled(9, 0x7F)(t.view(torch.uint8)).view(torch.float8_e4m3fn)),
        ["a weight in FP8 is no number"],
    ),
    "a zero point of 16": ("gptq", put(UP + "qzeros", lambda t: torch.full_like(t, -1)), ["zero point of 16"]),
    "columns apart": ("gptq", put(UP + "g_idx", lambda t: spoiled(5, 1)(t)), ["g_idx puts columns"]),
    "another size": ("int4 symmetric", put(UP + "weight_shape", lambda t: t + 1), ["weight_shape says [257, 129]"]),
    "long scales": (
        "awq",
        put(UP + "scales", lambda t: torch.full(t.shape, 1 / 3)),
        ["scales of more than 20 bits"],
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, tmp_path: Path) -> None:
    kind, change, words = TENSORS[case]
    write_checkpoint(tmp_path, kind)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError) as refused:
        checkpoint = open_checkpoint(tmp_path)
        pack(checkpoint.source, checkpoint.config, formats=checkpoint.formats)
    assert all(word in str(refused.value) for word in [str(path), *words]), refused.value
    assert "\n" not in str(refused.value)
