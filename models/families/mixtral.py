"""Mixtral: a Mistral whose MLPs are mixtures of few large experts (arXiv:2401.04088)."""

from __future__ import annotations

from models.config import ModelConfig
from models.families.base import Family, Layer, Module
from models.families.llama import DEFAULTS, LAYER
from models.families.mixture import DOWN, GATE_UP, mixture

_QKV, _OUTPUT, *_ = LAYER.linears
_EXPERT = "block_sparse_moe.experts.{expert}."
_MIXTURE = mixture(
    Module("block_sparse_moe.gate", "num_experts", ("mlp.gate",)),
    (f"{_EXPERT}w1", f"{_EXPERT}w3", f"{_EXPERT}w2"),
    ((f"mlp.{GATE_UP}",), (f"mlp.{DOWN}",)),
)

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    layer=Layer((_QKV, _OUTPUT, *_MIXTURE)),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    sizes={"num_experts": ("num_local_experts",), "experts_per_token": ("num_experts_per_tok",)},
    fixed={"renormalised": True},
    window_switch="",
    theta=1000000.0,
    presets={
        "mixtral-8x7b": ModelConfig(  # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1
            family="mixtral",
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=32000,
            rms_eps=1e-5,
            rope_theta=1000000.0,
            num_experts=8,
            experts_per_token=2,
            renormalised=True,
            max_position=32768,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
    },
)
