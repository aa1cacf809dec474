"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values alone (arXiv:2407.10671)."""

from __future__ import annotations

from models.config import ModelConfig
from models.families.base import Family
from models.families.llama import LAYER

DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
}

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=LAYER,
    defaults=DEFAULTS,
    fixed={"qkv_bias": True},
    window_switch="use_sliding_window",
    ignored=("attention_bias",),
    presets={
        "qwen2.5-7b": ModelConfig(  # https://huggingface.co/Qwen/Qwen2.5-7B
            family="qwen2",
            hidden_size=3584,
            intermediate_size=18944,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=152064,
            rms_eps=1e-6,
            rope_theta=1000000.0,
            qkv_bias=True,
            max_position=131072,
            bos_token_id=151643,
            eos_token_ids=(151643,),
        ),
    },
)
