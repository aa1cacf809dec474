"""Reading Hugging Face configurations, in both spellings, against transformers' own reading of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import ModelConfig, RopeScaling
from models.errors import UserError
from models.families import FAMILIES, PRESETS
from models.hf_config import hf_values, parse_config, read_config
from models.stored import stored_tensors
from models.weights import expected_tensors, parameter_count
from tests.support.configs import SMALL_CONFIGS, make_model

# config.json and generation_config.json as published for Llama-3.2-1B-Instruct, in the spelling of transformers 4
PUBLISHED_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
PUBLISHED_GENERATION = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "top_p": 0.9,
}


def transformers_dict(name: str) -> dict[str, Any]:
    """What transformers itself would write for a small model."""
    return json.loads(make_model(name).config.to_json_string())


def version_4_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for `rope_parameters`, `torch_dtype` for `dtype`, as transformers 4 has it."""
    values = dict(values)
    rope = dict(values.pop("rope_parameters"))
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["torch_dtype"] = values.pop("dtype", "float32")
    return values


def test_the_published_model_is_the_preset() -> None:
    config = parse_config(PUBLISHED_CONFIG)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert replace(config, eos_token_ids=(128001,)) == PRESETS["llama-3.2-1b"]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("smollm2-1.7b", 1_711_376_384),
        ("granite-8b-code", 8_054_910_976),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("granite-3.3-8b", 8_170_864_640),
    ],
)
def test_presets_have_the_published_parameter_counts(preset: str, parameters: int) -> None:
    assert parameter_count(PRESETS[preset]) == parameters
    assert sum(math.prod(shape) for shape in expected_tensors(PRESETS[preset]).values()) == parameters


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    model = make_model(name)
    config = parse_config(transformers_dict(name))
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert {key: tensor.shape for key, tensor in stored_tensors(config, shapes).items()} == shapes
    if not config.num_experts:
        assert expected_tensors(config) == shapes
    assert parameter_count(config) == model.num_parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_back(name: str) -> None:
    """A checkpoint of made-up weights says in its `config.json` what it was made of."""
    assert parse_config(json.loads(json.dumps(hf_values(PRESETS[name])))) == PRESETS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_are_transformers_defaults_in_every_family(name: str) -> None:
    """Written by transformers with all its defaults, and with none: the same."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 32, "vocab_size": 9}
    given = sizes | ({"max_position_embeddings": 4096} if name == "mistral" else {})  # whose window is 4096
    full = json.loads(AutoConfig.for_model(name, **given).to_json_string(use_diff=False))
    assert parse_config({"model_type": name, **given}) == parse_config({**full, "architectures": None})


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_both_spellings_say_the_same(name: str) -> None:
    values = transformers_dict(name)
    old = version_4_spelling(values)
    assert parse_config(old) == parse_config(values)
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")  # before transformers 4.45
        assert parse_config(old) == parse_config(values)


def test_what_is_left_out_takes_the_defaults_of_transformers() -> None:
    import transformers

    given: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    full = json.loads(transformers.LlamaConfig(**given).to_json_string())
    full["num_key_value_heads"], full["head_dim"] = None, None
    config = parse_config({"model_type": "llama", **given})
    assert config == parse_config(full)
    assert (config.num_kv_heads, config.head_dim, config.bos_token_id, config.eos_token_ids) == (4, 24, 1, (2,))


def test_no_special_tokens() -> None:
    config = parse_config({**PUBLISHED_CONFIG, "bos_token_id": None, "eos_token_id": None})
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_llama3_without_original_length_takes_the_context_length() -> None:
    values = {**PUBLISHED_CONFIG, "rope_scaling": dict(PUBLISHED_CONFIG["rope_scaling"])}
    del values["rope_scaling"]["original_max_position_embeddings"]
    assert parse_config(values).rope_scaling.original_max_position == 131072


def test_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED_CONFIG, "eos_token_id": 7}))
    assert read_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED_GENERATION))
    assert read_config(tmp_path).eos_token_ids == (128001, 128008, 128009)
    assert read_config(tmp_path / "config.json") == read_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_config(tmp_path).eos_token_ids == (7,)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["default", "linear", "llama3"]),
    factor=st.floats(1, 64),
    theta=st.floats(1, 1e7),
    ends=st.lists(st.integers(0, 100), max_size=3),
    start=st.none() | st.integers(0, 100),
)
def test_json_round_trip(kind: str, factor: float, theta: float, ends: list[int], start: int | None) -> None:
    scaling = RopeScaling(kind=kind, factor=factor, original_max_position=77)
    config = ModelConfig(
        64, 32, 2, 4, 2, 16, 50, rope_theta=theta, rope_scaling=scaling, bos_token_id=start, eos_token_ids=tuple(ends)
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_wants_every_key_and_no_other() -> None:
    values = PRESETS["llama-3-8b"].to_dict()
    with pytest.raises(UserError, match="unknown key 'wings'"):
        ModelConfig.from_dict({**values, "wings": 2})
    del values["head_dim"]
    with pytest.raises(UserError, match="missing key 'head_dim'"):
        ModelConfig.from_dict(values)


def test_derived_sizes() -> None:
    config = replace(PRESETS["llama-3.2-1b"], head_dim=24)
    assert (config.group, config.padded_head_dim) == (4, 32)
    assert PRESETS["llama-3-8b"].padded_head_dim == 128
