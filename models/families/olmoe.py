"""OLMoE: all queries are normed together, and all keys, and experts' weights are the router's softmax as it is
(arXiv:2409.02060)."""

from __future__ import annotations

import dataclasses

from models.config import ModelConfig
from models.families.base import Family, Layer
from models.families.llama import BIASES, DEFAULTS, LAYER
from models.families.mixture import SIZES
from models.families.qwen3_moe import MIXTURE

_QKV, _OUTPUT, *_ = LAYER.linears
_NORMED = dataclasses.replace(_QKV, head_norms=("self_attn.q_norm", "self_attn.k_norm"), norms_together=True)

FAMILY = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    layer=Layer((_NORMED, _OUTPUT, *MIXTURE)),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
    },
    booleans={"attention_bias": BIASES["attention_bias"], "norm_topk_prob": ("renormalised",)},
    sizes=SIZES,
    presets={
        "olmoe-1b-7b": ModelConfig(  # https://huggingface.co/allenai/OLMoE-1B-7B-0924
            family="olmoe",
            hidden_size=2048,
            intermediate_size=1024,
            num_layers=16,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            vocab_size=50304,
            rms_eps=1e-5,
            rope_theta=10000.0,
            num_experts=64,
            experts_per_token=8,
            max_position=4096,
            eos_token_ids=(50279,),
        ),
    },
)
