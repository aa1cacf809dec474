"""Qwen3, the dense models: a Llama that norms every head of queries and keys before it turns them (arXiv:2505.09388)."""

from __future__ import annotations

import dataclasses

from models.config import ModelConfig
from models.families.base import Family, Layer
from models.families.llama import BIASES, LAYER
from models.families.qwen2 import DEFAULTS

_QKV, *_OTHERS = LAYER.linears
_QWEN3 = ModelConfig(
    family="qwen3",
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    rms_eps=1e-6,
    rope_theta=1000000.0,
    tied_embeddings=True,
    max_position=40960,
    bos_token_id=151643,
    eos_token_ids=(151645,),
)

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=Layer((dataclasses.replace(_QKV, head_norms=("self_attn.q_norm", "self_attn.k_norm")), *_OTHERS)),
    defaults={**DEFAULTS, "head_dim": 128},
    booleans={"attention_bias": BIASES["attention_bias"]},
    window_switch="use_sliding_window",
    presets={  # https://huggingface.co/Qwen: Qwen3-0.6B, -1.7B, -4B, -8B
        "qwen3-0.6b": _QWEN3,
        "qwen3-1.7b": dataclasses.replace(_QWEN3, hidden_size=2048, intermediate_size=6144),
        "qwen3-4b": dataclasses.replace(_QWEN3, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32),
        "qwen3-8b": dataclasses.replace(
            _QWEN3, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, tied_embeddings=False
        ),
    },
)
