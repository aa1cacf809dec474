"""Experts' tensors in checkpoints: each by itself, or all of a layer in one, under any of the names that modules have had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.errors import UserError
from models.weights import Weights
from tests.support.configs import MIXTURES, random_tensors, save_checkpoint, small_config
from tests.support.hf_model import as_transformers_has_them


def rewritten(name: str, directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as transformers writes it, but with these tensors."""
    save_checkpoint(name, directory)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def published(config: ModelConfig, name: str, directory: Path) -> list[str]:
    """The names in a checkpoint that transformers writes."""
    return sorted(load_file(save_checkpoint(name, directory) / "model.safetensors"))


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_are_those_that_are_stored_apart(name: str, tmp_path: Path) -> None:
    config = small_config(name)
    tensors = random_tensors(config, seed=2)
    stacked = as_transformers_has_them(config, tensors)
    assert len(stacked) < len(tensors)
    directory = rewritten(name, tmp_path, stacked)
    found = Weights.collect(open_checkpoint(directory).source).by_name
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.7.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w3.weight"),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight"),
    ],
)
def test_names_are_the_published_ones(name: str, some: str, tmp_path: Path) -> None:
    """As transformers saves them, which is what is on the hub; and what is missing is called by the name that it has there."""
    names = published(small_config(name), name, tmp_path)
    assert some in names
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if key != some}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {some} is missing"):
        open_checkpoint(tmp_path)


def test_a_stacked_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    stacked = as_transformers_has_them(small_config("olmoe"), random_tensors(small_config("olmoe"), seed=2))
    key = "model.layers.0.mlp.experts.down_proj"
    directory = rewritten("olmoe", tmp_path, stacked | {key: stacked[key][:-1]})
    with pytest.raises(UserError, match=rf"{key} has shape \[16, 96, 48\], but config.json makes it \[17, 96, 48\]"):
        open_checkpoint(directory)


def test_an_expert_beside_those_in_one_tensor_is_left_over(tmp_path: Path) -> None:
    config = small_config("olmoe")
    tensors = random_tensors(config, seed=2)
    key = "model.layers.0.mlp.experts.2.down_proj.weight"
    directory = rewritten("olmoe", tmp_path, {**as_transformers_has_them(config, tensors), key: tensors[key]})
    with pytest.raises(UserError, match=r"mlp\.experts\.0\.down_proj\.weight is missing"):
        open_checkpoint(directory)


def test_quantised_mixtures_are_refused_in_one_line(tmp_path: Path) -> None:
    directory = save_checkpoint("olmoe", tmp_path)
    text = (directory / "config.json").read_text()
    quantised = (
        '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true},'
    )
    (directory / "config.json").write_text(text.replace("{", quantised, 1))
    with pytest.raises(UserError, match="quantised mixtures of experts are not supported: take the bf16 checkpoint"):
        open_checkpoint(directory)
