"""Everything that can be wrong with a configuration, or be given in place of a checkpoint: one line with name and mend.

Each case changes one thing in a sound `config.json` and says what the line must hold. For damaged weights see
test_malformed_files.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from models.errors import printable
from tests.support.damage import VALUES, refused, write_single

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MISTRAL: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
GRANITE: dict[str, Any] = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}

CONFIG_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": ({"architectures": ["MistralForCausalLM"]}, ["'MistralForCausalLM'", "LlamaForCausalLM"]),
    "an architecture that is not supported": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": None},
        ["architecture 'GPT2LMHeadModel'", "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"],
    ),
    "a model type that is not supported": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        ["model_type 'gpt2'", "llama, mistral, qwen2, qwen3, granite"],
    ),
    "a list for a model type": ({"model_type": ["llama"]}, ["model_type ['llama']", "not supported"]),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "B"]}, ["architecture", "not supported"]),
    "architecture for another task": (
        {"architectures": ["LlamaForSequenceClassification"]},
        ["SequenceClassification"],
    ),
    "no architecture": ({"architectures": None, "model_type": None}, ["architecture", "LlamaForCausalLM"]),
    "another model type": ({"model_type": "qwen2"}, ["model_type 'qwen2'", "LlamaForCausalLM", "Qwen2ForCausalLM"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config", "not supported"]),
    "sliding window": ({"sliding_window": 4096}, ["sliding_window", "4096"]),
    "a window that the context exceeds": (
        MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 32768},
        ["sliding_window = 4096", "max_position_embeddings = 32768", "set max_position_embeddings to 4096"],
    ),
    "a window by default": (MISTRAL | {"max_position_embeddings": 4097}, ["sliding_window = 4096", "4097"]),
    "a window switched on": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 64},
        ["sliding_window = 64", "max_position_embeddings to 64"],
    ),
    "layers with a window that is switched off": (
        QWEN2 | {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types", "'sliding_attention'"],
    ),
    "a switch that is a number": (QWEN2 | {"use_sliding_window": 1}, ["use_sliding_window", "true or false"]),
    "biases that the family has not": (MISTRAL | {"attention_bias": True}, ["attention_bias = True", "with False"]),
    "multipliers that the family has not": ({"residual_multiplier": 0.22}, ["residual_multiplier = 0.22", "with 1"]),
    "a multiplier of zero": (GRANITE | {"logits_scaling": 0}, ["logits_scaling", "above 0"]),
    "a multiplier that is text": (GRANITE | {"embedding_multiplier": "12"}, ["embedding_multiplier", "'12'", "number"]),
    "a multiplier that is infinite": (GRANITE | {"attention_multiplier": math.inf}, ["attention_multiplier", "finite"]),
    "experts of another family": (
        {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]},
        ["model_type 'qwen2_moe'", "qwen3_moe"],
    ),
    "dense layers among experts": (
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]},
        ["mlp_only_layers", "[]"],
    ),
    "clipped queries": (
        {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "clip_qkv": 8.0},
        ["clip_qkv = 8.0", "without it"],
    ),
    "more experts than the kernel compares": (
        {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": 129},
        ["num_experts is 129", "128"],
    ),
    "more experts a token than there are": (
        {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 5},
        ["experts_per_token is 5 of 4"],
    ),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
    "tensor parallel pretraining": ({"pretraining_tp": 2}, ["pretraining_tp = 2", "with 1"]),
    "experts": ({"num_local_experts": 8}, ["num_local_experts", "8"]),
    "stored type": ({"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "bfloat16"]),
    "stored type, old spelling": ({"torch_dtype": "float64"}, ["torch_dtype", "float64"]),
    "no hidden size": ({"hidden_size": None}, ["hidden_size is missing"]),
    "negative hidden size": ({"hidden_size": -64}, ["hidden_size", "-64", "at least 1"]),
    "a string for a size": ({"num_hidden_layers": "2"}, ["num_hidden_layers", "'2'", "integer"]),
    "a fraction of a head": ({"num_attention_heads": 4.5}, ["num_attention_heads", "4.5"]),
    "true for a size": ({"intermediate_size": True}, ["intermediate_size", "True"]),
    "no tokens": ({"vocab_size": 0}, ["vocab_size", "0"]),
    "too many tokens": ({"vocab_size": 2**24}, ["vocab_size", "16777216", "not supported"]),
    "too many layers": ({"num_hidden_layers": 10**9}, ["num_layers", "1000000000", "not supported"]),
    "heads do not divide": ({"num_key_value_heads": 3}, ["4 query heads", "3 KV heads", "multiple"]),
    "odd head": ({"head_dim": 15}, ["head_dim", "15", "even"]),
    "head cannot be derived": ({"head_dim": None, "hidden_size": 66}, ["hidden_size 66", "head_dim must be given"]),
    "norm epsilon is text": ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "'1e-5'", "number"]),
    "norm epsilon is zero": ({"rms_norm_eps": 0}, ["rms_eps", "above 0"]),
    "tied is text": ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'", "true or false"]),
    "bias is a number": ({"mlp_bias": 1}, ["mlp_bias", "1", "true or false"]),
    "negative end token": ({"eos_token_id": [2, -1]}, ["eos_token_id", "-1"]),
    "end token is text": ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
    "begin token is text": ({"bos_token_id": "<s>"}, ["bos_token_id", "<s>"]),
    "theta is infinite": ({"rope_theta": math.inf}, ["rope_theta", "inf", "finite"]),
    "theta is huge": ({"rope_theta": 10**400}, ["rope_theta", "too large"]),
    "rope scaling is a list": ({"rope_scaling": [8.0]}, ["rope_scaling is a list", "object"]),
    "rope type": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling", "'yarn'", "llama3"]),
    "rope type, old spelling": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["'dynamic'", "linear"]),
    "rope type, new spelling": ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters", "'longrope'"]),
    "rope factor is missing": ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor is missing"]),
    "rope factor is NaN": ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, ["factor", "nan", "finite"]),
    "rope factor is negative": ({"rope_parameters": {**LLAMA3, "factor": -8.0}}, ["factor", "-8.0", "above 0"]),
    "rope factor is text": (
        {"rope_parameters": {**LLAMA3, "factor": "8"}},
        ["rope_parameters.factor", "'8'", "number"],
    ),
    "rope thresholds cross": (
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        ["high_freq_factor", "low_freq_factor", "4.0"],
    ),
    "rope length is a fraction": (
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32.5}},
        ["rope_parameters.original_max_position_embeddings", "32.5"],
    ),
    "part of the head rotates": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "part of the head rotates, new spelling": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ["rope_parameters.partial_rotary_factor", "0.25"],
    ),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["rope_parameters.full_attention", "by layer type"],
    ),
    "two rope scalings": (
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        ["rope_scaling and rope_parameters", "keep only one"],
    ),
    "two thetas": (
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ["rope_theta", "10000.0", "500000.0", "keep only one"],
    ),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_config(case: str, tmp_path: Path) -> None:
    changes, fragments = CONFIG_CASES[case]
    tmp_path.joinpath("config.json").write_text(json.dumps({**VALUES, **changes}))
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    for fragment in fragments:
        assert fragment in message


def test_no_such_directory(tmp_path: Path) -> None:
    for model in (tmp_path / "gone", str(tmp_path / "gone"), "./gone", "gone", "a/b/c", "x" * 5000, "nul\0"):
        message = refused(model)
        assert printable(str(model))[:50] in message and "no such directory" in message and "random:" in message


def test_a_file_for_a_directory(tmp_path: Path) -> None:
    write_single(tmp_path)
    assert "is a file, give the directory" in refused(tmp_path / "config.json")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("cannot reach the hub\nwith a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = refused("owner/model")
    assert "owner/model" in message and "(cannot reach the hub)" in message and "local directory" in message
