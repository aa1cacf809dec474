"""llama.cpp's keys in Hugging Face's words: every architecture, and RoPE's factors found again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.config import RopeScaling
from models.errors import UserError
from models.gguf.config import hf_config, hf_name
from models.gguf.rope_factors import llama3_factors, scaling_of
from models.hf_config import parse_config
from models.weights import expected_tensors
from tests.support.gguf_files import gguf_name

SIZES = {
    "context_length": 4096,
    "embedding_length": 512,
    "block_count": 3,
    "feed_forward_length": 1024,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1000000.0,
}
EXPECTED = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "sliding_window": None,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": [7],
}
TOKENS = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 7}
SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, 512)}


def keys(architecture: str, **more: Any) -> dict[str, Any]:
    named = {f"{architecture}.{key.replace('__', '.')}": value for key, value in {**SIZES, **more}.items()}
    return {"general.architecture": architecture, **named, **TOKENS}


def translated(values: dict[str, Any], shapes: dict[str, tuple[int, ...]] = SHAPES, factors: Any = None) -> dict[str, Any]:
    return hf_config(values, shapes, lambda: factors)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        keys("llama"),
        {},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    ),
    "llama with biases and a head": (
        keys("llama"),
        {"output.weight": (1000, 512), "blk.0.attn_q.bias": (512,), "blk.0.ffn_up.bias": (1024,)},
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "mistral": (keys("mistral"), {}, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
    "mistral with a window": (
        keys("mistral", attention__sliding_window=4096),
        {},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    ),
    "qwen2, biases by family": (
        keys("qwen2"),
        {"blk.0.attn_q.bias": (512,)},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    ),
    "qwen3, heads that are not derived": (
        keys("qwen3", attention__key_length=128, attention__value_length=128),
        {},
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "attention_bias": False},
    ),
    "granite": (
        keys(
            "granite",
            attention__scale=0.0078125,
            embedding_scale=12.0,
            residual_scale=float(np.float32(0.22)),
            logit_scale=8.0,
        ),
        {},
        {
            "model_type": "granite",
            "architectures": ["GraniteForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": float(np.float32(0.22)),
            "logits_scaling": 8.0,
        },
    ),
    "a list with one number a layer": (
        keys("llama", attention__head_count_kv=np.array([2, 2, 2], np.int32), feed_forward_length=np.array([1024] * 3)),
        {},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    ),
    "yarn": (
        keys("qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0),
        {},
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        },
    ),
    "an old linear scale": (
        keys("qwen2", rope__scale_linear=2.0),
        {},
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "a part of each head is turned": (
        keys("qwen2", rope__dimension_count=32),
        {},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "partial_rotary_factor": 0.5},
    ),
    "experts": (
        keys("qwen2", expert_count=8),
        {},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_local_experts": 8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_keys_become_a_configuration(case: str) -> None:
    values, shapes, changes = CASES[case]
    assert translated(values, {**SHAPES, **shapes}) == {**EXPECTED, **changes}


def test_what_a_family_lacks_is_refused_by_its_own_reader() -> None:
    """No key of a file is passed over because its architecture is one that we have."""
    for more, complaint in (
        ({"attention__sliding_window": 4096}, "sliding_window"),
        ({"rope__scaling__type": "yarn"}, "yarn"),
        ({"rope__dimension_count": 32}, "partial_rotary_factor"),
        ({"expert_count": 8}, "num_local_experts"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_config(translated(keys("llama", **more)))


def test_a_file_without_a_window_has_none_by_default() -> None:
    """Where transformers' configuration of Mistral would take 4096."""
    assert parse_config(translated(keys("mistral", context_length=32768))).max_position == 32768


def test_ends_by_their_text() -> None:
    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "<|eot_id|>"]
    values = keys("llama") | {
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array([3, 3, 3, 1, 1], np.int32),
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.eom_token_id": 3,
    }
    assert translated(values)["eos_token_id"] == [2, 3, 0], "those that are named first; what is no control token is text"


ROPES = [
    (500000.0, 128, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    (500000.0, 64, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
    (500000.0, 128, RopeScaling("llama3", 16.0, 1.0, 6.0, 4096)),
    (10000.0, 96, RopeScaling("llama3", 4.0, 1.0, 2.5, 3000)),
    (1000000.0, 128, RopeScaling("llama3", 6.5, 1.0, 32.0, 32768)),
]


@pytest.mark.parametrize("theta,dim,rope", ROPES)
def test_factors_tell_the_scaling(theta: float, dim: int, rope: RopeScaling) -> None:
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    factors = llama3_factors(
        frequencies, rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    ).astype(np.float32)
    assert scaling_of(factors, theta, dim) == rope
    shapes = {**SHAPES, "rope_freqs.weight": (dim // 2,)}
    values = keys("llama", rope__freq_base=theta, attention__key_length=dim, attention__value_length=dim)
    assert parse_config(translated(values, shapes, factors)).rope_scaling == rope


def test_another_low_factor_means_the_same_with_another_context() -> None:
    """Of three numbers two show in the factors; what is found turns every dimension as what was meant."""
    frequencies = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    factors = llama3_factors(frequencies, 8.0, 2.0, 8.0, 16384)
    found = scaling_of(factors.astype(np.float32), 500000.0, 128)
    assert found is not None
    again = llama3_factors(
        frequencies, found.factor, found.low_freq_factor, found.high_freq_factor, found.original_max_position
    )
    np.testing.assert_allclose(again, factors, rtol=1e-5)


@pytest.mark.parametrize(
    "factors",
    [np.linspace(1, 8, 32), np.full(32, np.nan), np.full(32, -1.0), np.zeros(32), np.full(32, 0.5), np.full(32, np.inf)],
    ids=["a ramp", "NaN", "negative", "zero", "below one", "infinite"],
)
def test_other_factors_are_refused(factors: np.ndarray) -> None:
    assert scaling_of(factors.astype(np.float32), 500000.0, 64) is None
    with pytest.raises(UserError, match="rope_freqs.weight holds factors that are not those of Llama 3's scaling"):
        translated(keys("llama"), {**SHAPES, "rope_freqs.weight": (32,)}, factors.astype(np.float32))


def test_names_are_those_of_hugging_face() -> None:
    config = parse_config(
        {"model_type": "llama", **EXPECTED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    )
    for name in expected_tensors(config):
        assert hf_name(gguf_name(name)) == name
    for name in ("blk.0.attn_q_norm.weight", "blk.11.attn_k_norm.weight"):
        assert gguf_name(hf_name(name) or "") == name
    for name in ("blk.0.ffn_gate_inp.weight", "blk.00.attn_q.weight", "blk.-1.attn_q.weight", "rope_freqs.weight", "blk.0", ""):
        assert hf_name(name) is None
