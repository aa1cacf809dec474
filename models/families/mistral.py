"""Mistral 7B: a Llama without biases, whose attention may see no further than a sliding window (arXiv:2310.06825).

A window that no context exceeds changes nothing; any other is refused.
"""

from __future__ import annotations

from models.config import ModelConfig
from models.families.base import Family
from models.families.llama import DEFAULTS, LAYER

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    layer=LAYER,
    defaults={**DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    window_switch="",
    presets={
        "mistral-7b": ModelConfig(  # https://huggingface.co/mistralai/Mistral-7B-v0.3
            family="mistral",
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=32768,
            rms_eps=1e-5,
            rope_theta=1000000.0,
            max_position=32768,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
    },
)
