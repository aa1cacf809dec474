"""Granite 3.x: a Llama whose embedding, attention scores, residual additions and logits are scaled (arXiv:2408.13359)."""

from __future__ import annotations

from models.config import ModelConfig
from models.families.base import Family
from models.families.llama import BIASES, DEFAULTS, LAYER

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    layer=LAYER,
    defaults={**DEFAULTS, **dict.fromkeys(MULTIPLIERS, 1.0)},
    booleans=BIASES,
    numbers={name: name for name in MULTIPLIERS},
    presets={
        "granite-3.3-8b": ModelConfig(  # https://huggingface.co/ibm-granite/granite-3.3-8b-instruct
            family="granite",
            hidden_size=4096,
            intermediate_size=12800,
            num_layers=40,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=49159,
            rms_eps=1e-5,
            rope_theta=10000000.0,
            tied_embeddings=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.0078125,
            residual_multiplier=0.22,
            logits_scaling=16.0,
            max_position=131072,
            bos_token_id=0,
            eos_token_ids=(0,),
        ),
    },
)
