"""Llama 2 and 3, and what else is a Llama by its configuration: SmolLM2, TinyLlama, Granite-8B-Code.

Its layer is the one that most families share (arXiv:2302.13971): attention and SwiGLU, each with a norm before it.
"""

from __future__ import annotations

import dataclasses

from models.config import ModelConfig, RopeScaling
from models.families.base import Family, Layer, Linear, Module, Norm

LAYER = Layer(
    (
        Linear(
            "qkv",
            (
                Module("self_attn.q_proj", "query_size"),
                Module("self_attn.k_proj", "key_value_size"),
                Module("self_attn.v_proj", "key_value_size"),
            ),
            source="hidden",
            columns="hidden_size",
            row_order="heads",
            bias="qkv_bias",
            norm=Norm("attention", "input_layernorm"),
        ),
        Linear(
            "o",
            (Module("self_attn.o_proj", "hidden_size"),),
            source="attention",
            columns="query_size",
            row_order="hidden",
            bias="o_bias",
        ),
        Linear(
            "gate_up",
            (Module("mlp.gate_proj", "intermediate_size"), Module("mlp.up_proj", "intermediate_size")),
            source="hidden",
            columns="hidden_size",
            row_order="gate_up",
            bias="mlp_bias",
            norm=Norm("mlp", "post_attention_layernorm"),
        ),
        Linear(
            "down",
            (Module("mlp.down_proj", "hidden_size"),),
            source="mlp",
            columns="intermediate_size",
            row_order="hidden",
            bias="mlp_bias",
        ),
    )
)
BIASES = {"attention_bias": ("qkv_bias", "o_bias"), "mlp_bias": ("mlp_bias",)}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}

_LLAMA_32_ROPE = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
_LLAMA_3 = ModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    rms_eps=1e-5,
    rope_theta=500000.0,
    max_position=8192,
    bos_token_id=128000,
    eos_token_ids=(128001,),
)
_SMOLLM2 = ModelConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    rms_eps=1e-5,
    rope_theta=100000.0,
    tied_embeddings=True,
    max_position=8192,
    bos_token_id=0,
    eos_token_ids=(0,),
)

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    layer=LAYER,
    defaults=DEFAULTS,
    booleans=BIASES,
    presets={  # https://huggingface.co: meta-llama/Llama-3.2-1B, -3.2-3B, Meta-Llama-3-8B
        "llama-3.2-1b": dataclasses.replace(
            _LLAMA_3,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=16,
            head_dim=64,
            rope_scaling=_LLAMA_32_ROPE,
            tied_embeddings=True,
            max_position=131072,
        ),
        "llama-3.2-3b": dataclasses.replace(
            _LLAMA_3,
            hidden_size=3072,
            intermediate_size=8192,
            num_layers=28,
            num_heads=24,
            rope_scaling=_LLAMA_32_ROPE,
            tied_embeddings=True,
            max_position=131072,
        ),
        "llama-3-8b": _LLAMA_3,
        "smollm2-135m": _SMOLLM2,  # HuggingFaceTB/SmolLM2-135M, -1.7B
        "smollm2-1.7b": dataclasses.replace(
            _SMOLLM2,
            hidden_size=2048,
            intermediate_size=8192,
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            rope_theta=130000.0,
        ),
        "granite-8b-code": ModelConfig(  # ibm-granite/granite-8b-code-base-4k
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=49152,
            rms_eps=1e-5,
            rope_theta=10000.0,
            tied_embeddings=True,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            max_position=4096,
            bos_token_id=0,
            eos_token_ids=(0,),
        ),
    },
)
