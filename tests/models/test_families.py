"""The registry of families: complete, tested, and all that adding one takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.config import ModelConfig
from models.errors import UserError
from models.families import FAMILIES, PRESETS, layer_of, llama
from models.hf_config import hf_values, parse_config
from models.reference import Reference
from models.tape import COLUMN_ORDERS, ROW_ORDERS, TapeLayout
from models.weights import expected_tensors
from tests.support.configs import SMALL_CONFIGS, random_tensors, small_config


def test_every_family_is_held_to_transformers() -> None:
    assert {values.get("model_type", "llama") for values in SMALL_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_whole(name: str) -> None:
    """It bears its name, has a published shape, and its layer speaks of what there is."""
    family = FAMILIES[name]
    assert family.name == name and family.presets
    properties = {field.name for field in dataclasses.fields(ModelConfig)}
    assert {field for fields in family.booleans.values() for field in fields} <= properties
    assert {*family.numbers.values(), *family.fixed} <= properties
    for linear in family.layer.linears:
        assert linear.row_order in ROW_ORDERS and linear.source in COLUMN_ORDERS and linear.bias in {"", *properties}
        assert len(linear.head_norms) in ((0, 2) if linear.kind == "qkv" else (0,))
    kinds = [linear.kind for linear in family.layer.linears]
    norms = [norm.kind for norm in family.layer.norms]
    assert len(set(kinds)) == len(kinds) and len(set(norms)) == len(norms)


def test_a_preset_bears_the_name_of_its_family_alone() -> None:
    assert sum(len(family.presets) for family in FAMILIES.values()) == len(PRESETS)
    assert all(preset.family == name for name, family in FAMILIES.items() for preset in family.presets.values())


def test_a_family_that_is_not_there_is_refused_with_those_that_are() -> None:
    config = dataclasses.replace(small_config("mha"), family="gpt2")
    for use in (layer_of, expected_tensors, hf_values, lambda config: TapeLayout.from_config(config, 2)):
        with pytest.raises(UserError, match="family 'gpt2' is not supported: use a model of one of llama, mistral, qwen2"):
            use(config)


def test_adding_one_takes_its_data_and_a_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama under another name, whose output projection alone has a bias, and which has no norm before its MLP."""
    qkv, output, gate_up, down = llama.LAYER.linears
    layer = dataclasses.replace(llama.LAYER, linears=(qkv, output, dataclasses.replace(gate_up, norm=None), down))
    toy = dataclasses.replace(
        llama.FAMILY, name="toy", architecture="ToyForCausalLM", layer=layer, booleans={}, fixed={"o_bias": True}, presets={}
    )
    monkeypatch.setitem(FAMILIES, "toy", toy)
    config = parse_config({**hf_values(small_config("mha")), "model_type": "toy", "architectures": ["ToyForCausalLM"]})
    assert (config.family, config.qkv_bias, config.o_bias) == ("toy", False, True)
    assert parse_config(hf_values(config)) == config
    layout = TapeLayout.from_config(config, 2)
    assert layout.norms() == [("attention", 0), ("attention", 1), ("final", 0)]
    assert layout.matrix("o", 1).bias_sources == ("model.layers.1.self_attn.o_proj.bias",)
    assert layout.matrix("qkv", 1).bias_offset == -1
    names = set(expected_tensors(config))
    assert "model.layers.0.post_attention_layernorm.weight" not in names
    tensors = random_tensors(config, seed=1)
    logits = Reference(config, tensors).logits([1, 2, 3])
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(config.hidden_size)
    assert not torch.equal(Reference(config, tensors).logits([1, 2, 3]), logits)
